// SPDX-License-Identifier: Apache-2.0
#include <gdn/io/checkpoint_index.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <io/files.hpp>
#include <support/errors.hpp>
#include <support/random.hpp>

namespace {

using gdn::dtype;
using gdn::index_t;
using gdn::layer_dims;
using gdn::metadata_error;
using gdn::weight_layout;
using gdn_test::temporary_directory;
using gdn_test::text_of;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr layer_dims dims{.hidden = 3, .key_heads = 2, .value_heads = 6, .key_dim = 4, .value_dim = 5, .conv_width = 4};
const std::string config_text = R"({"model_type": "qwen3_5", "text_config": {"hidden_size": 3,
  "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 4, "linear_value_head_dim": 5,
  "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "hidden_act": "silu", "mamba_ssm_dtype": "SSM"}})";

std::string config_with(const std::string& ssm) {
  std::string text = config_text;
  return text.replace(text.find("SSM"), 3, ssm);
}

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
  /// Values that `type` holds exactly, another in every tensor.
  parameters(const layer_dims& d, std::uint64_t n, dtype type) : parameters(d) {
    gdn_test::random_source random(n);
    std::uniform_real_distribution<double> value(-2, 2);
    views.for_each([&](std::string_view name, const auto& t) {
      using W = typename std::remove_cvref_t<decltype(t)>::value_type;
      const dtype as = gdn::stored_type(name, type);
      for (index_t i = 0; i < t.size(); ++i) {
        const double v = value(random.engine());
        t.data()[i] = static_cast<W>(as == dtype::bf16  ? static_cast<double>(gdn::from_bf16(gdn::to_bf16(v)))
                                     : as == dtype::f16 ? static_cast<double>(gdn::from_f16(gdn::to_f16(v)))
                                                        : static_cast<double>(static_cast<float>(v)));
      }
    });
  }
  struct free {
    void operator()(void* p) const { ::operator delete (p, std::align_val_t{256}); }
  };
  std::unique_ptr<void, free> memory;
  gdn::parameter_storage<T> views;
};

template <class T>
std::vector<double> all_values(const gdn::parameter_storage<T>& p) {
  std::vector<double> out;
  p.for_each([&](std::string_view, const auto& t) {
    for (index_t i = 0; i < t.size(); ++i) {
      const auto v = t.data()[i];
      if constexpr (sizeof v == 2) {
        out.push_back(static_cast<double>(static_cast<float>(v)));
      } else {
        out.push_back(static_cast<double>(v));
      }
    }
  });
  return out;
}

/// A model of `layers` layers with other tensors between them, in `shards` files.
struct model {
  model(weight_layout layout, std::string before, int shards, dtype type = dtype::bf16, std::string ssm = "float32")
      : prefix(std::move(before)) {
    std::vector<gdn::stored_tensor> tensors;
    tensors.push_back({prefix + "embed_tokens.weight", dtype::i8, {100}, std::vector<std::byte>(100)});
    for (index_t n = 0; n < layers; ++n) {
      weights.emplace_back(dims, static_cast<std::uint64_t>(n), type);
      for (auto& t : gdn::stored_parameters(weights.back().views, layout, layer(n), dims, type)) {
        tensors.push_back(std::move(t));
      }
    }
    tensors.push_back({"mtp.layers.0.linear_attn.A_log", dtype::f32, {1}, std::vector<std::byte>(4)});
    std::vector<gdn::tensor_entry> entries;
    for (const auto& t : tensors) entries.push_back(t.entry());
    if (shards == 0) {
      gdn::write_safetensors(files.path("model.safetensors"), entries);
    } else {
      gdn::save_checkpoint(files.path(""), entries, shards);
    }
    files.write("config.json", config_with(ssm));
  }
  std::string layer(index_t n) const { return prefix + "layers." + std::to_string(n) + ".linear_attn."; }
  std::string index() const { return files.path("model.safetensors.index.json"); }
  /// Replaces `from` in the index.
  void edit(const std::string& from, const std::string& to) const {
    std::string text = gdn_test::read_file(index());
    ASSERT_NE(text.find(from), std::string::npos);
    files.write("model.safetensors.index.json", text.replace(text.find(from), from.size(), to));
  }

  static constexpr index_t layers = 3;
  std::string prefix;
  temporary_directory files;
  std::vector<parameters<float>> weights;
};

TEST(checkpoint, LoadsEveryLayoutPrefixAndNumberOfFiles) {
  for (const weight_layout layout : {weight_layout::split, weight_layout::interleaved}) {
    for (const char* prefix : {"model.", "model.language_model."}) {
      for (const int shards : {0, 1, 3, 7}) {
        const model m(layout, prefix, shards);
        const auto c = gdn::open_checkpoint(m.files.path(""));
        EXPECT_EQ(c.mapped(), shards == 0 ? 1U : 0U);
        ASSERT_TRUE(c.config());
        EXPECT_EQ(c.expect_config().dims.value_heads, 6);
        for (index_t n = 0; n < model::layers; ++n) {
          EXPECT_EQ(gdn::layer_prefix(c, n), m.layer(n));
          EXPECT_FALSE(gdn::validate_checkpoint(c, n, dims));
          EXPECT_EQ(gdn::checkpoint_layout(c, n, dims), layout);
          parameters<float> p(dims);
          gdn::load_parameters<float>(c, n, c.expect_config().dims, p.views);
          EXPECT_EQ(all_values(p.views), all_values(m.weights[static_cast<std::size_t>(n)].views));
        }
        EXPECT_FALSE(gdn::validate_shards(c));
        EXPECT_EQ(c.mapped(), c.index().shards.size());
        EXPECT_EQ(c.index().shards.size(), static_cast<std::size_t>(std::max(shards, 1)));
      }
    }
  }
}

TEST(checkpoint, OpensTheIndexAFileOrADirectory) {
  const model m(weight_layout::split, "model.", 3);
  for (const std::string& path :
       {m.files.path(""), m.index(), m.files.path("").substr(0, m.files.path("").size() - 1)}) {
    EXPECT_EQ(gdn::open_checkpoint(path).path(), m.index());
  }
  const auto one = gdn::open_checkpoint(m.files.path("model-00001-of-00003.safetensors"));
  EXPECT_EQ(one.index().shards, std::vector<std::string>{"model-00001-of-00003.safetensors"});
  EXPECT_NE(one.find("model.embed_tokens.weight"), nullptr);
  EXPECT_EQ(one.find("model.norm.weight"), nullptr);
}

TEST(checkpoint, MapsAFileWhenItIsNeededAndOnce) {
  const model m(weight_layout::split, "model.", 3);
  const auto c = gdn::open_checkpoint(m.index());
  EXPECT_EQ(c.mapped(), 0U);
  const gdn::tensor_entry* first = c.find("model.embed_tokens.weight");
  EXPECT_EQ(c.mapped(), 1U);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (index_t n = 0; n < model::layers; ++n) {
        parameters<double> p(dims);
        gdn::load_parameters<double>(c, n, dims, p.views);
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(c.mapped(), 3U);
  EXPECT_EQ(c.find("model.embed_tokens.weight"), first);
}

TEST(checkpoint, RoundsGatesAsTheConfigSays) {
  for (const auto& [name, type] : {std::pair{"float32", dtype::f32}, std::pair{"bfloat16", dtype::bf16}}) {
    const model m(weight_layout::split, "model.", 2, dtype::bf16, name);
    const auto c = gdn::open_checkpoint(m.files.path(""));
    EXPECT_EQ(c.ssm(), type);
    parameters<float> p(dims);
    gdn::load_parameters<float>(c, 1, dims, p.views);
    for (index_t h = 0; h < dims.value_heads; ++h) {
      EXPECT_EQ(p.views.A_log(h), gdn::round_through(type, m.weights[1].views.A_log(h)));
    }
  }
}

TEST(checkpoint, NeedsNoConfig) {
  const model m(weight_layout::split, "model.", 3);
  std::filesystem::remove(m.files.path("config.json"));
  const auto c = gdn::open_checkpoint(m.index());
  EXPECT_FALSE(c.config());
  EXPECT_EQ(c.ssm(), dtype::f32);
  EXPECT_EQ(text_of<metadata_error>([&] { c.expect_config(); }), m.index() + ": there is no config.json beside it");
}

/// Every type of file into every type of layer, and back.
template <class T>
void check_round_trip(weight_layout layout, dtype type) {
  const temporary_directory files;
  const parameters<T> p(dims, 5, type);
  const std::string path = files.path("layer.safetensors");
  gdn::save_parameters(path, p.views, layout, "model.layers.0.linear_attn.", dims, type);
  const auto file = gdn::open_safetensors(path);
  EXPECT_EQ(file.tensors().size(), layout == weight_layout::split ? 9U : 7U);
  for (const gdn::tensor_entry& t : file.tensors()) {
    const bool fp32 = t.name.ends_with(".A_log") || t.name.ends_with(".dt_bias") || t.name.ends_with(".norm.weight");
    EXPECT_EQ(t.type, fp32 ? dtype::f32 : type) << t.name;
  }
  EXPECT_EQ(file.find("model.layers.0.linear_attn.conv1d.weight")->shape, (std::vector<index_t>{46, 1, 4}));
  const auto c = gdn::open_checkpoint(path);
  parameters<T> back(dims);
  gdn::load_parameters<T>(c, 0, dims, back.views);
  EXPECT_EQ(all_values(back.views), all_values(p.views));
  gdn::save_parameters(files.path("again"), back.views, layout, "model.layers.0.linear_attn.", dims, type);
  EXPECT_EQ(gdn_test::read_file(files.path("again")), gdn_test::read_file(path));
}

TEST(save_parameters, IsTheInverseOfLoading) {
  for (const weight_layout layout : {weight_layout::split, weight_layout::interleaved}) {
    for (const dtype type : {dtype::f64, dtype::f32, dtype::f16, dtype::bf16}) {
      check_round_trip<double>(layout, type);
      check_round_trip<float>(layout, type);
    }
    check_round_trip<gdn::bfloat16>(layout, dtype::bf16);
    check_round_trip<gdn::bfloat16>(layout, dtype::f32);
    check_round_trip<gdn::float16>(layout, dtype::f16);
    check_round_trip<gdn::float16>(layout, dtype::f64);
  }
}

TEST(save_parameters, RoundsOnceAndKeepsNaN) {
  parameters<double> p(dims, 1, dtype::f32);
  p.views.out_proj(0, 0) = 1 + 0x1p-8 + 0x1p-40;  // twice rounded it would be 1
  p.views.out_proj(0, 1) = std::numeric_limits<double>::quiet_NaN();
  const auto tensors = gdn::stored_parameters(p.views, weight_layout::split, "", dims, dtype::bf16);
  const auto at =
      std::find_if(tensors.begin(), tensors.end(), [](const auto& t) { return t.name == "out_proj.weight"; });
  const auto values = gdn::values_of<float>(at->entry());
  EXPECT_EQ(values[0], 1 + 0x1p-7F);
  EXPECT_TRUE(values[1] != values[1]);
  EXPECT_THAT(
      text_of<metadata_error>([&] { gdn::stored_parameters(p.views, weight_layout::split, "", dims, dtype::i64); }),
      "weights cannot be written as I64");
}

TEST(load_parameters, KeepsTheBitsOfTheStoredType) {
  const temporary_directory files;
  parameters<gdn::bfloat16> p(dims, 1, dtype::bf16);
  p.views.out_proj(0, 0).bits = 0xff81;  // a signalling NaN
  p.views.out_proj(0, 1).bits = 0x8001;  // the smallest negative one
  gdn::save_parameters(files.path("f"), p.views, weight_layout::interleaved, "layers.0.linear_attn.", dims,
                       dtype::bf16);
  parameters<gdn::bfloat16> back(dims);
  gdn::load_parameters<gdn::bfloat16>(gdn::open_checkpoint(files.path("f")), 0, dims, back.views);
  EXPECT_EQ(back.views.out_proj(0, 0).bits, 0xff81);
  EXPECT_EQ(back.views.out_proj(0, 1).bits, 0x8001);
}

std::string finding(const std::string& index) {
  const auto found = gdn::validate_checkpoint_index(index);
  const std::string text = text_of<metadata_error>([&] { gdn::parse_checkpoint_index(index); });
  EXPECT_EQ(found ? gdn_test::plain(found->text) : "no error", text);
  return text;
}

TEST(checkpoint_index, SortsTensorsAndFiles) {
  const auto index = gdn::parse_checkpoint_index(
      R"({"weight_map": {"b": "y/2.safetensors", "a": "x", "c": "x"}, "metadata": {"total_size": 1}})");
  EXPECT_EQ(index.shards, (std::vector<std::string>{"x", "y/2.safetensors"}));
  EXPECT_EQ(index.tensors.size(), 3U);
  EXPECT_EQ(index.find("b")->shard, 1U);
  EXPECT_EQ(index.find("c")->shard, 0U);
  EXPECT_EQ(index.find("d"), nullptr);
}

TEST(checkpoint_index, RejectsWhatIsNoIndex) {
  EXPECT_EQ(finding(""), "it is no JSON: error at its byte 1");
  EXPECT_EQ(finding("{\"weight_map\": {\"a\": \"b\"}"), "it is no JSON: error at its byte 26");
  EXPECT_EQ(finding("[]"), "it is an array; it must be an object");
  EXPECT_EQ(finding("{}"), "it has no weight_map");
  EXPECT_EQ(finding("{\"weight_map\": []}"), "weight_map is an array; it must be an object");
  EXPECT_EQ(finding("{\"weight_map\": {}}"), "weight_map is empty");
  EXPECT_EQ(finding("{\"weight_map\": {\"\": \"x\"}}"), "weight_map has a tensor without a name");
  EXPECT_EQ(finding("{\"weight_map\": {\"a\": 3}}"), "weight_map: tensor 'a' is in 3; it must be the name of a file");
  EXPECT_EQ(finding("{\"weight_map\": {\"a\": {\"b\": \"c\"}}}"),
            "weight_map: tensor 'a' is in an object; it must be the name of a file");
  EXPECT_EQ(finding("{\"weight_map\": {\"a\": \"x\", \"a\": \"x\"}}"), "it has the key 'a' twice");
  EXPECT_EQ(finding("{\"weight_map\": {\"a\": \"x\"}, \"weight_map\": {\"b\": \"x\"}}"),
            "it has the key 'weight_map' twice");
  EXPECT_EQ(finding("{\"weight_map\": {\"a\": \"\xff\"}}"), "it is no text in UTF-8: error at its byte 22");
  EXPECT_EQ(finding("{\"x\": 1e999, \"weight_map\": {\"a\": \"x\"}}"), "'x' is a number beyond double");
}

TEST(checkpoint_index, RejectsFilesOutsideItsDirectory) {
  for (const char* path : {"", "/etc/passwd", "..", "../x", "a/../../x", "a//b", "./x", "a/", "a\\u0000b"}) {
    EXPECT_THAT(finding(std::string("{\"weight_map\": {\"a\": \"") + path + "\"}}"),
                AllOf(HasSubstr("tensor 'a' is in '"), HasSubstr("it must be a file beside the index or below it")))
        << path;
  }
  for (const char* path : {"x", "a/b.safetensors", "..x", "x.."}) {
    EXPECT_EQ(finding(std::string("{\"weight_map\": {\"a\": \"") + path + "\"}}"), "no error");
  }
}

TEST(checkpoint, ErrorsNameTheFileTheTensorAndTheRule) {
  const auto load = [](const model& m, index_t n = 1) {
    return text_of<metadata_error>([&] {
      parameters<float> p(dims);
      gdn::load_parameters<float>(gdn::open_checkpoint(m.files.path("")), n, dims, p.views);
    });
  };
  {
    const temporary_directory empty;
    EXPECT_EQ(text_of<metadata_error>([&] { gdn::open_checkpoint(empty.path("")); }),
              empty.path("") + ": has neither model.safetensors nor model.safetensors.index.json");
    EXPECT_THAT(text_of<metadata_error>([&] { gdn::open_checkpoint(empty.path("x")); }),
                HasSubstr(empty.path("x") + ": cannot be opened"));
  }
  {
    const model m(weight_layout::split, "model.", 3);
    std::filesystem::remove(m.files.path("model-00002-of-00003.safetensors"));
    EXPECT_THAT(load(m), HasSubstr("model-00002-of-00003.safetensors: cannot be opened"));
    const auto c = gdn::open_checkpoint(m.files.path(""));
    EXPECT_THAT(gdn::validate_shards(c)->text, HasSubstr("model-00002-of-00003.safetensors: cannot be opened"));
    EXPECT_THAT(gdn::validate_checkpoint(c, 1, dims)->text, HasSubstr("cannot be opened"));
  }
  {
    const model m(weight_layout::split, "model.", 3);
    m.files.write("model-00002-of-00003.safetensors", "no tensors");
    EXPECT_THAT(load(m), HasSubstr("model-00002-of-00003.safetensors: the header has"));
  }
  {  // in the index, but not in the file
    const model m(weight_layout::split, "model.", 3);
    m.edit("\"model.layers.1.linear_attn.A_log\"", "\"model.layers.1.linear_attn.A_lag\"");
    EXPECT_THAT(load(m),
                AllOf(HasSubstr("model-0000"), HasSubstr("tensor 'model.layers.1.linear_attn.A_lag' is missing"),
                      HasSubstr("model.safetensors.index.json' says that it is here")));
  }
  {  // in two files
    const model m(weight_layout::split, "model.", 3);
    std::filesystem::copy_file(m.files.path("model-00002-of-00003.safetensors"), m.files.path("copy"));
    m.edit("\"model.layers.1.linear_attn.A_log\": \"model-00002-of-00003.safetensors\"",
           "\"model.layers.1.linear_attn.A_log\": \"copy\"");
    EXPECT_THAT(load(m), AllOf(HasSubstr("copy: tensor '"), HasSubstr("is here, but"),
                               HasSubstr("says that it is in 'model-00002-of-00003.safetensors'")));
  }
  {
    const model m(weight_layout::split, "model.", 3);
    m.edit("\"weight_map\"", "\"weight_mop\"");
    EXPECT_EQ(load(m), m.index() + ": it has no weight_map");
  }
  {
    const model m(weight_layout::split, "model.", 3);
    m.files.write("config.json", "{}");
    EXPECT_EQ(load(m), m.files.path("config.json") + ": config has no hidden_size");
  }
  {
    const model m(weight_layout::split, "model.", 3);
    EXPECT_EQ(load(m, 7), "no tensor's name has 'layers.7.linear_attn.'");
    layer_dims other = dims;
    other.hidden = 4;
    const auto c = gdn::open_checkpoint(m.files.path(""));
    EXPECT_THAT(gdn::validate_checkpoint(c, 0, other)->text, HasSubstr("has the shape"));
    EXPECT_THAT(text_of<metadata_error>([&] { gdn::checkpoint_layout(c, 0, other); }), HasSubstr("has the shape"));
  }
}

TEST(save_checkpoint, RejectsWhatCannotBeWritten) {
  const temporary_directory files;
  const gdn::tensor_entry t{"a", dtype::i8, {0}, {}};
  const auto text = [&](std::vector<gdn::tensor_entry> tensors, int shards) {
    return text_of<metadata_error>([&] { gdn::save_checkpoint(files.path(""), tensors, shards); });
  };
  EXPECT_EQ(text({}, 1), "a checkpoint without tensors cannot be written");
  EXPECT_EQ(text({t}, 0), "a checkpoint cannot have 0 files");
  EXPECT_EQ(text({t, t}, 1), "the name 'a' comes twice");
  EXPECT_EQ(files.files(), 0U);
  EXPECT_THAT(text_of<metadata_error>(
                  [&] { gdn::save_checkpoint(files.path("absent"), std::vector<gdn::tensor_entry>{t}, 1); }),
              HasSubstr("cannot be created"));
  gdn::save_checkpoint(files.path(""), std::vector<gdn::tensor_entry>{t}, 3);
  EXPECT_FALSE(gdn::validate_shards(gdn::open_checkpoint(files.path(""))));
}

/// Whatever happens to an index, it is refused with a message or means what it says.
TEST(checkpoint_index, SurvivesMutation) {
  const model m(weight_layout::split, "model.", 2);
  const std::string sound = gdn_test::read_file(m.index());
  const std::vector<std::string> tokens = {"\"",
                                           "{",
                                           "}",
                                           "[",
                                           "]",
                                           ":",
                                           ",",
                                           "null",
                                           "1e999",
                                           "-1",
                                           "\"a\":\"b\",",
                                           "\"weight_map\":",
                                           "../",
                                           "/",
                                           "\\u0000",
                                           "\xff",
                                           std::string(1, '\0')};
  std::mt19937_64 random(gdn_test::seed());
  const auto below = [&](std::size_t n) { return n == 0 ? 0 : static_cast<std::size_t>(random() % n); };
  int refused = 0, read = 0;
  for (int n = 0; n < 4000; ++n) {
    SCOPED_TRACE(testing::Message() << "seed " << gdn_test::seed() << ", case " << n);
    std::string text = sound;
    for (std::size_t k = 1 + below(3); k > 0; --k) {
      const std::size_t at = below(text.size());
      switch (below(5)) {
        case 0:
          text[at] = static_cast<char>(text[at] ^ static_cast<char>(1U << below(8)));
          break;
        case 1:
          text.resize(at);
          break;
        case 2:
          text.insert(at, tokens[below(tokens.size())]);
          break;
        case 3:
          text.erase(at, 1 + below(30));
          break;
        default:
          text.insert(below(text.size()), text.substr(at, 1 + below(60)));
      }
    }
    const auto found = gdn::validate_checkpoint_index(text);
    if (found) {
      EXPECT_FALSE(found->text.empty());
      EXPECT_THROW(gdn::parse_checkpoint_index(text), metadata_error);
      ++refused;
      continue;
    }
    ++read;
    const auto index = gdn::parse_checkpoint_index(text);
    for (const auto& t : index.tensors) ASSERT_LT(t.shard, index.shards.size());
    for (const auto& s : index.shards) {
      ASSERT_TRUE(!s.empty() && s.front() != '/' && ("/" + s + "/").find("/../") == std::string::npos) << s;
    }
    if (n % 8 != 0) continue;
    m.files.write("mutant.index.json", text);  // opens, and every use either works or says why not
    try {
      const auto c = gdn::open_checkpoint(m.files.path("mutant.index.json"));
      const auto first = gdn::validate_shards(c);
      parameters<float> p(dims);
      gdn::load_parameters<float>(c, 0, dims, p.views);
    } catch (const metadata_error& e) {
      EXPECT_STRNE(e.what(), "");
    }
  }
  EXPECT_GT(refused, 500);
  EXPECT_GT(read, 100);
}

}  // namespace
