// SPDX-License-Identifier: Apache-2.0
#include <gdn/core/dtype.hpp>
#include <gdn/core/half.hpp>
#include <gdn/layer/ssm_gate.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include <gtest/gtest.h>

namespace {

/// What the conformance tests need to know of a 16-bit format.
struct bf16 {
  static constexpr int mantissa = 7;
  static constexpr int bias = 127;
  static constexpr std::uint16_t infinity = 0x7f80;
  static std::uint16_t to(double v) { return gdn::to_bf16(v); }
  static float from(std::uint16_t b) { return gdn::from_bf16(b); }
};
struct f16 {
  static constexpr int mantissa = 10;
  static constexpr int bias = 15;
  static constexpr std::uint16_t infinity = 0x7c00;
  static std::uint16_t to(double v) { return gdn::to_f16(v); }
  static float from(std::uint16_t b) { return gdn::from_f16(b); }
};

template <class Format>
class half_conversions : public ::testing::Test {
 public:
  /// The value of the bits without sign, by the definition; above the largest as if the range went on.
  static double magnitude(unsigned bits) {
    const int exponent = static_cast<int>(bits >> Format::mantissa);
    const unsigned fraction = bits & ((1U << Format::mantissa) - 1);
    const unsigned implicit = exponent > 0 ? 1U << Format::mantissa : 0U;
    return std::ldexp(static_cast<double>(fraction | implicit),
                      (exponent > 0 ? exponent : 1) - Format::bias - Format::mantissa);
  }
};
using formats = ::testing::Types<bf16, f16>;
TYPED_TEST_SUITE(half_conversions, formats);

TYPED_TEST(half_conversions, EveryValueIsReadByDefinition) {
  for (unsigned bits = 0; bits < TypeParam::infinity; ++bits) {
    const auto b = static_cast<std::uint16_t>(bits);
    ASSERT_EQ(TypeParam::from(b), TestFixture::magnitude(bits)) << bits;
    ASSERT_EQ(TypeParam::from(b | 0x8000), -TestFixture::magnitude(bits)) << bits;
    ASSERT_TRUE(std::signbit(TypeParam::from(b | 0x8000))) << bits;
  }
  EXPECT_EQ(TypeParam::from(TypeParam::infinity), std::numeric_limits<float>::infinity());
}

TYPED_TEST(half_conversions, EveryPatternSurvivesTheRoundTrip) {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const auto b = static_cast<std::uint16_t>(bits);
    const float value = TypeParam::from(b);
    if (std::isnan(value)) {
      ASSERT_GT(bits & 0x7fff, TypeParam::infinity) << bits;
      ASSERT_TRUE(std::isnan(TypeParam::from(TypeParam::to(static_cast<double>(value))))) << bits;
      ASSERT_EQ(TypeParam::to(static_cast<double>(value)) & 0x8000, bits & 0x8000) << bits;
    } else {
      ASSERT_EQ(TypeParam::to(static_cast<double>(value)), b) << bits;
    }
  }
}

TYPED_TEST(half_conversions, RoundToNearestEvenAtEveryMidpoint) {
  for (unsigned bits = 0; bits < TypeParam::infinity; ++bits) {
    const double low = TestFixture::magnitude(bits);
    const double high = TestFixture::magnitude(bits + 1);
    const double middle = low + (high - low) / 2;  // exact in double
    const unsigned even = bits + bits % 2;
    for (const unsigned sign : {0U, 0x8000U}) {
      const double s = sign != 0 ? -1 : 1;
      ASSERT_EQ(TypeParam::to(s * middle), sign | even) << bits;
      ASSERT_EQ(TypeParam::to(s * std::nextafter(middle, 0.0)), sign | bits) << bits;
      ASSERT_EQ(TypeParam::to(s * std::nextafter(middle, high)), sign | (bits + 1)) << bits;
    }
  }
}

TYPED_TEST(half_conversions, ExtremesOfDoubleBecomeZeroOrInfinity) {
  using limits = std::numeric_limits<double>;
  EXPECT_EQ(TypeParam::to(limits::denorm_min()), 0);
  EXPECT_EQ(TypeParam::to(-limits::min()), 0x8000);
  EXPECT_EQ(TypeParam::to(limits::max()), TypeParam::infinity);
  EXPECT_EQ(TypeParam::to(-limits::infinity()), TypeParam::infinity | 0x8000);
  EXPECT_TRUE(std::isnan(TypeParam::from(TypeParam::to(limits::quiet_NaN()))));
  EXPECT_TRUE(std::isnan(TypeParam::from(TypeParam::to(limits::signaling_NaN()))));
}

TEST(float_to_bf16, IsToBf16OfEveryFloat) {  // every 251st: signs, exponents, ties, NaN; all were compared once
  for (std::uint64_t bits = 0; bits < std::uint64_t{1} << 32; bits += 251) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    ASSERT_EQ(gdn::float_to_bf16(value), gdn::to_bf16(static_cast<double>(value))) << bits;
  }
  for (std::uint64_t bits = 0x8000; bits < std::uint64_t{1} << 32; bits += 0x10000) {  // every tie
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    ASSERT_EQ(gdn::float_to_bf16(value), gdn::to_bf16(static_cast<double>(value))) << bits;
  }
}

TEST(dtype, NamesFindTheirType) {
  for (const gdn::dtype_info& d : gdn::dtypes) EXPECT_EQ(gdn::dtype_named(d.name), d.type);
  EXPECT_FALSE(gdn::dtype_named("f32"));
  EXPECT_FALSE(gdn::dtype_named(""));
}

TEST(ssm_dtype, NamesWithAndWithoutTorch) {
  EXPECT_EQ(gdn::resolve_ssm_dtype("float32"), gdn::dtype::f32);
  EXPECT_EQ(gdn::resolve_ssm_dtype("torch.float64"), gdn::dtype::f64);
  EXPECT_EQ(gdn::resolve_ssm_dtype("torch.bfloat16"), gdn::dtype::bf16);
  EXPECT_EQ(gdn::resolve_ssm_dtype("float16"), gdn::dtype::f16);
}

TEST(ssm_dtype, RejectsWhatIsNoFloatingType) {
  for (const char* name : {"", "int8", "torch.", "torch.int32", "torch.torch.float32", "Float32", "float32 ", "bool"}) {
    EXPECT_TRUE(gdn::validate_ssm_dtype(name)) << name;
    EXPECT_THROW(gdn::resolve_ssm_dtype(name), gdn::metadata_error) << name;
  }
}

TEST(ssm_dtype, NarrowTypesRoundOnceAndWideOnesNever) {
  const double above_tie = 1 + 0x1p-8 + 0x1p-40;  // through float it would be the tie, and round down
  EXPECT_EQ(gdn::round_through(gdn::dtype::bf16, above_tie), 1 + 0x1p-7);
  EXPECT_EQ(gdn::round_through(gdn::dtype::f16, 2.0F + 0x1p-9F + 0x1p-20F), 2.0F + 0x1p-9F);
  EXPECT_EQ(gdn::round_through(gdn::dtype::f32, above_tie), above_tie);
  EXPECT_EQ(gdn::round_through(gdn::dtype::f64, 0.1F), 0.1F);
}

}  // namespace
