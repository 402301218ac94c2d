// SPDX-License-Identifier: Apache-2.0
#include <gdn/io/checkpoint.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <new>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace {

using gdn::dtype;
using gdn::index_t;
using gdn::layer_dims;
using gdn::weight_layout;
using ::testing::HasSubstr;

const std::vector<layer_dims> sizes = {
    {.hidden = 5, .key_heads = 1, .value_heads = 1, .key_dim = 1, .value_dim = 1, .conv_width = 1},
    {.hidden = 3, .key_heads = 2, .value_heads = 6, .key_dim = 4, .value_dim = 5, .conv_width = 4},
    {.hidden = 7, .key_heads = 3, .value_heads = 3, .key_dim = 2, .value_dim = 3, .conv_width = 2},
    {.hidden = 2, .key_heads = 2, .value_heads = 8, .key_dim = 3, .value_dim = 1, .conv_width = 3}};

/// Tensors with the memory that they view.
class tensors {
 public:
  /// Every element of every tensor has another value, which `type` holds.
  tensors(weight_layout layout, const layer_dims& d, const std::string& prefix, dtype type = dtype::f32) {
    double next = 0;
    for (const gdn::named_shape& p : gdn::parameter_shapes(layout, d)) {
      const index_t size = std::accumulate(p.shape.begin(), p.shape.end(), index_t{1}, std::multiplies<>());
      std::vector<double> values(static_cast<std::size_t>(size));
      for (double& v : values) v = next++;
      add(prefix + p.name, p.shape, values, type);
    }
  }
  void add(const std::string& name, const std::vector<index_t>& shape, std::span<const double> values, dtype type) {
    bytes_.push_back(gdn::encode(values, type));
    file.tensors.push_back({name, type, shape, bytes_.back()});
    std::sort(file.tensors.begin(), file.tensors.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  }
  void remove(const std::string& name) {
    std::erase_if(file.tensors, [&](const auto& t) { return t.name == name; });
  }

  gdn::safetensors file;

 private:
  std::vector<std::vector<std::byte>> bytes_;
};

/// Parameters with their memory.
template <class T>
struct parameters {
  explicit parameters(const layer_dims& d) {
    gdn::workspace<gdn::host_memory> measure;
    gdn::parameter_storage<T>::carve(measure, d);
    const std::size_t bytes = measure.peak().bytes;
    memory.reset(::operator new (bytes, std::align_val_t{256}));
    gdn::workspace<gdn::host_memory> ws(memory.get(), bytes);
    views = gdn::parameter_storage<T>::carve(ws, d);
  }
  struct free {
    void operator()(void* p) const { ::operator delete (p, std::align_val_t{256}); }
  };
  std::unique_ptr<void, free> memory;
  gdn::parameter_storage<T> views;
};

TEST(interleaved_rows, FollowTheFormulaOfTheGroups) {
  for (const layer_dims& d : sizes) {
    const index_t r = d.ratio();
    const index_t k = d.key_dim;
    const index_t v = d.value_dim;
    std::vector<index_t> seen;
    for (index_t h = 0; h < d.key_heads; ++h) {
      const index_t group = h * (2 * k + 2 * r * v);
      for (index_t i = 0; i < k; ++i) {
        EXPECT_EQ(gdn::interleaved_qkvz_row(d, h * k + i), group + i);
        EXPECT_EQ(gdn::interleaved_qkvz_row(d, d.keys() + h * k + i), group + k + i);
      }
      for (index_t j = 0; j < r; ++j) {
        for (index_t i = 0; i < v; ++i) {
          const index_t column = (h * r + j) * v + i;
          EXPECT_EQ(gdn::interleaved_qkvz_row(d, 2 * d.keys() + column), group + 2 * k + j * v + i);
          EXPECT_EQ(gdn::interleaved_qkvz_row(d, d.channels() + column), group + 2 * k + r * v + j * v + i);
        }
        EXPECT_EQ(gdn::interleaved_ba_row(d, h * r + j), h * 2 * r + j);
        EXPECT_EQ(gdn::interleaved_ba_row(d, d.value_heads + h * r + j), h * 2 * r + r + j);
      }
    }
  }
}

TEST(interleaved_rows, AreAPermutation) {
  for (const layer_dims& d : sizes) {
    std::vector<index_t> rows;
    for (index_t c = 0; c < d.channels() + d.values(); ++c) rows.push_back(gdn::interleaved_qkvz_row(d, c));
    std::sort(rows.begin(), rows.end());
    for (std::size_t i = 0; i < rows.size(); ++i) ASSERT_EQ(rows[i], static_cast<index_t>(i));
  }
}

TEST(load_parameters, BothLayoutsGiveTheSameLayer) {
  for (const layer_dims& d : sizes) {
    const tensors interleaved(weight_layout::interleaved, d, "l.");
    parameters<float> a(d);
    gdn::load_parameters<float>(interleaved.file, "l.", d, a.views);
    const auto qkvz = gdn::values_of<float>(*interleaved.file.find("l.in_proj_qkvz.weight"));
    const auto ba = gdn::values_of<float>(*interleaved.file.find("l.in_proj_ba.weight"));
    const auto at = [&](const auto& m, index_t row, index_t column) {
      return m[static_cast<std::size_t>(row * d.hidden + column)];
    };
    for (index_t x = 0; x < d.hidden; ++x) {
      for (index_t c = 0; c < d.channels(); ++c) {
        ASSERT_EQ(a.views.in_proj_qkv(c, x), at(qkvz, gdn::interleaved_qkvz_row(d, c), x));
      }
      for (index_t c = 0; c < d.values(); ++c) {
        ASSERT_EQ(a.views.in_proj_z(c, x), at(qkvz, gdn::interleaved_qkvz_row(d, d.channels() + c), x));
      }
      for (index_t h = 0; h < d.value_heads; ++h) {
        ASSERT_EQ(a.views.in_proj_b(h, x), at(ba, gdn::interleaved_ba_row(d, h), x));
        ASSERT_EQ(a.views.in_proj_a(h, x), at(ba, gdn::interleaved_ba_row(d, d.value_heads + h), x));
      }
    }
    // The same layer written in the split layout loads equal.
    tensors split(weight_layout::split, d, "l.");
    split.file.tensors.clear();
    for (const auto& t : gdn::checkpoint_tensors(a.views, weight_layout::split, "l.", d)) {
      split.add(t.name, t.shape, t.values, dtype::f32);
    }
    parameters<float> b(d);
    gdn::load_parameters<float>(split.file, "l.", d, b.views);
    const auto again = gdn::checkpoint_tensors(b.views, weight_layout::interleaved, "l.", d);
    for (const auto& t : again) {
      EXPECT_EQ(t.values, gdn::values_of<double>(*interleaved.file.find(t.name))) << t.name;
    }
  }
}

TEST(checkpoint_tensors, AreTheInverseOfLoading) {
  for (const layer_dims& d : sizes) {
    for (const weight_layout layout : {weight_layout::split, weight_layout::interleaved}) {
      const tensors file(layout, d, "model.layers.0.linear_attn.", dtype::f64);
      parameters<double> p(d);
      gdn::load_parameters<double>(file.file, "model.layers.0.linear_attn.", d, p.views);
      const auto back = gdn::checkpoint_tensors(p.views, layout, "model.layers.0.linear_attn.", d);
      EXPECT_EQ(back.size(), layout == weight_layout::split ? 9U : 7U);
      for (const gdn::named_values& t : back) {
        const gdn::tensor_entry* in = file.file.find(t.name);
        ASSERT_NE(in, nullptr) << t.name;
        EXPECT_EQ(t.shape, in->shape);
        EXPECT_EQ(t.values, gdn::values_of<double>(*in)) << t.name;
      }
    }
  }
}

TEST(load_parameters, GatesKeepFullPrecisionUnlessTheModelKeepsThemNarrow) {
  const layer_dims d = sizes[1];
  tensors t(weight_layout::split, d, "");
  t.remove("A_log");
  const std::vector<double> values = {1 + 0x1p-20, 1 + 0x1p-40, 1 + 0x1p-8, 0.1, -3.3, 7};
  t.add("A_log", {6}, values, dtype::f64);
  parameters<double> wide(d);
  gdn::load_parameters<double>(t.file, "", d, wide.views);
  parameters<float> single(d);
  gdn::load_parameters<float>(t.file, "", d, single.views);
  parameters<double> narrow(d);
  gdn::load_parameters<double>(t.file, "", d, narrow.views, dtype::bf16);
  for (index_t h = 0; h < 6; ++h) {
    const double v = values[static_cast<std::size_t>(h)];
    EXPECT_EQ(wide.views.A_log(h), v);
    EXPECT_EQ(single.views.A_log(h), static_cast<float>(v));
    EXPECT_EQ(narrow.views.A_log(h), static_cast<double>(gdn::from_bf16(gdn::to_bf16(v))));
  }
  EXPECT_EQ(narrow.views.norm(1), wide.views.norm(1));
}

TEST(load_parameters, ReadsEveryFloatingType) {
  const layer_dims d = sizes[0];
  for (const dtype type : {dtype::f64, dtype::f32, dtype::f16, dtype::bf16}) {
    const tensors t(weight_layout::split, d, "x.", type);
    parameters<float> p(d);
    gdn::load_parameters<float>(t.file, "x.", d, p.views);
    EXPECT_EQ(p.views.out_proj(0, 0), gdn::values_of<float>(*t.file.find("x.out_proj.weight"))[0]);
  }
}

/// What is wrong with the parameters of `t`, or "" if nothing is; both validators must agree.
std::string finding(const tensors& t, const layer_dims& d) {
  const auto found = gdn::validate_checkpoint(t.file, "l.", d);
  parameters<float> p(d);
  try {
    gdn::load_parameters<float>(t.file, "l.", d, p.views);
  } catch (const gdn::metadata_error& e) {
    EXPECT_EQ(found ? found->text : "", e.what());
    return e.what();
  }
  EXPECT_FALSE(found);
  return "";
}

TEST(load_parameters, RejectsMissingTensorsByName) {
  for (const weight_layout layout : {weight_layout::split, weight_layout::interleaved}) {
    for (const gdn::named_shape& p : gdn::parameter_shapes(layout, sizes[1])) {
      tensors t(layout, sizes[1], "l.");
      t.remove("l." + p.name);
      EXPECT_THAT(finding(t, sizes[1]), HasSubstr("'l." + p.name + "' is missing"));
    }
  }
}

TEST(load_parameters, RejectsBothLayoutsAtOnce) {
  for (const char* other : {"l.in_proj_qkvz.weight", "l.in_proj_ba.weight"}) {
    tensors t(weight_layout::split, sizes[0], "l.");
    t.add(other, {1}, std::vector<double>{0}, dtype::f32);
    EXPECT_THAT(finding(t, sizes[0]), HasSubstr(other));
  }
  tensors t(weight_layout::interleaved, sizes[0], "l.");
  t.add("l.in_proj_a.weight", {1, 5}, std::vector<double>(5), dtype::f32);
  EXPECT_THAT(finding(t, sizes[0]), HasSubstr("two weight layouts"));
}

TEST(load_parameters, RejectsOtherShapesAndTypes) {
  for (const gdn::named_shape& p : gdn::parameter_shapes(weight_layout::split, sizes[1])) {
    tensors t(weight_layout::split, sizes[1], "l.");
    t.remove("l." + p.name);
    std::vector<index_t> shape = p.shape;
    shape.front() += 1;
    const index_t size = std::accumulate(shape.begin(), shape.end(), index_t{1}, std::multiplies<>());
    t.add("l." + p.name, shape, std::vector<double>(static_cast<std::size_t>(size)), dtype::f32);
    EXPECT_THAT(finding(t, sizes[1]), HasSubstr("'l." + p.name + "' has the shape"));
  }
  tensors t(weight_layout::split, sizes[0], "l.");
  for (gdn::tensor_entry& e : t.file.tensors) {
    if (e.name == "l.A_log") e.type = dtype::i32;
  }
  EXPECT_THAT(finding(t, sizes[0]), HasSubstr("'l.A_log' has dtype I32"));
}

TEST(layer_prefix, FindsTheLayerWhateverStandsBeforeIt) {
  for (const char* before : {"", "model.", "model.language_model.", "language_model.model."}) {
    tensors t(weight_layout::split, sizes[0], before + std::string("layers.3.linear_attn."));
    t.add(before + std::string("layers.13.linear_attn.A_log"), {1}, std::vector<double>{0}, dtype::f32);
    t.add("mtp.layers.3.linear_attn.A_log", {1}, std::vector<double>{0}, dtype::f32);
    t.add("model.players.3.linear_attn.A_log", {1}, std::vector<double>{0}, dtype::f32);
    EXPECT_EQ(gdn::layer_prefix(t.file, 3), before + std::string("layers.3.linear_attn."));
  }
}

TEST(layer_prefix, RejectsALayerThatIsAbsentOrThereTwice) {
  tensors t(weight_layout::split, sizes[0], "model.layers.3.linear_attn.");
  EXPECT_THROW(gdn::layer_prefix(t.file, 1), gdn::metadata_error);
  EXPECT_THROW(gdn::layer_prefix(t.file, 30), gdn::metadata_error);
  t.add("other.layers.3.linear_attn.A_log", {1}, std::vector<double>{0}, dtype::f32);
  EXPECT_THROW(gdn::layer_prefix(t.file, 3), gdn::metadata_error);
}

}  // namespace
