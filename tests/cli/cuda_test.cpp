// SPDX-License-Identifier: Apache-2.0
// What gdn-run with the CUDA backend accepts, decided on the host: no device, no compiler of CUDA.

#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <gdn/cuda/head_sizes.hpp>

#include "run_layer/bundle.hpp"
#include "run_layer/options.hpp"

namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using namespace gdn_run;

std::string refusal(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), {"--backend", "cuda"});
  arguments.emplace_back("bundle");
  try {
    parse_command(arguments);
  } catch (const usage_error& e) {
    return e.what();
  }
  return "accepted";
}

TEST(cuda_options, DoublesAreRefusedByName) {
  EXPECT_THAT(refusal({"--dtype", "f64"}), AllOf(HasSubstr("--dtype f64"), HasSubstr("--backend kokkos only")));
  for (const char* type : {"f32", "bf16", "f16"}) EXPECT_EQ(refusal({"--dtype", type}), "accepted");
}

TEST(cuda_options, WhatMovesHostMemoryIsRefusedByName) {
  EXPECT_THAT(refusal({"--comm", "threads"}), AllOf(HasSubstr("--comm threads"), HasSubstr("--backend cuda")));
  EXPECT_THAT(refusal({"--rule", "recurrent"}), HasSubstr("--rule recurrent"));
  EXPECT_EQ(parse_command(std::vector<std::string>{"--backend", "cuda", "b"}).run->comm, comm_kind::local);
}

TEST(cuda_options, ProductsAreIeeeUnlessFloatsAskForTf32) {
  const auto products = [](const std::vector<std::string>& arguments) { return parse_command(arguments).run->products; };
  EXPECT_EQ(products({"--backend", "cuda", "b"}), product_kind::ieee);
  EXPECT_EQ(products({"--backend", "cuda", "--products", "tf32", "b"}), product_kind::tf32);
  for (const char* type : {"bf16", "f16"}) {
    EXPECT_THAT(refusal({"--products", "tf32", "--dtype", type}), HasSubstr("--products tf32"));
  }
}

/// What gdn-run says of a bundle with such heads, or "accepted".
std::string heads(index_t K, index_t V, backend_kind backend = backend_kind::cuda) {
  options o;
  o.bundle = "file";
  o.backend = backend;
  bundle b;
  b.config.dims.key_dim = K;
  b.config.dims.value_dim = V;
  const auto found = exceeds_backend(o, b);
  return found ? found->text : "accepted";
}

TEST(cuda_heads, MultiplesOf16UpTo256AreAcceptedAndNothingElse) {
  for (index_t n = -1; n <= 600; ++n) {
    const bool right = n >= 16 && n <= 256 && n % 16 == 0;
    EXPECT_EQ(gdn::cuda::is_head_size(n), right) << n;
    EXPECT_EQ(!gdn::cuda::validate_head_sizes(n, 64), right) << n;
    EXPECT_EQ(!gdn::cuda::validate_head_sizes(64, n), right) << n;
  }
}

TEST(cuda_heads, RefusalsNameTheSizeTheKeyAndTheRule) {
  EXPECT_EQ(heads(16, 256), "accepted");
  EXPECT_THAT(heads(24, 64), AllOf(HasSubstr("file: "), HasSubstr("linear_key_head_dim is 24"), HasSubstr("16 up to 256")));
  EXPECT_THAT(heads(64, 272), AllOf(HasSubstr("linear_value_head_dim is 272"), HasSubstr("16 up to 256")));
  EXPECT_EQ(heads(7, 5, backend_kind::kokkos), "accepted");
  try {
    gdn::cuda::expects_head_sizes(64, 40);
    ADD_FAILURE() << "V = 40 was accepted";
  } catch (const gdn::backend_error& e) {
    EXPECT_THAT(e.what(), AllOf(HasSubstr("V, "), HasSubstr("is 40"), HasSubstr("multiples of 16 up to 256")));
  }
}

}  // namespace
