// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Calls whose operands do not fit, one at a time: each must be refused before anything is done.

#include <functional>
#include <string>

#include <gtest/gtest.h>

#include <gdn/core/error.hpp>
#include <gdn/core/tensor.hpp>

namespace gdn_test {

/// An operand of a call, and what the call must look at. Extents along axes that are not named may be others.
template <class T, int R, class M>
struct operand {
  const char* name;
  gdn::tensor_ref<T, R, M> tensor;
  unsigned axes = (1U << R) - 1;  ///< bit i: the extent of axis i must be as it is
  bool unit_stride = true;        ///< the last axis must be an array
  bool data = true;               ///< there must be elements
};
template <class T, int R, class M, class... Rules>
operand(const char*, gdn::tensor_ref<T, R, M>, Rules...) -> operand<T, R, M>;

inline void expect_refused(const std::function<void()>& call, const std::string& what) {
  EXPECT_THROW(call(), gdn::shape_error) << what;
}

/// call(tensors...) is right, and wrong with any one of them made wrong in one way. Wrong tensors are parts of the
/// right ones, so that a call that does not refuse them stays inside their memory. No axis may be shorter than two.
template <class Call, class... T, int... R, class... M>
void expect_wrong_operands_refused(Call&& call, operand<T, R, M>... operands) {
  const std::function<void()> run = [&] { call(operands.tensor...); };
  EXPECT_NO_THROW(run());
  const auto make_wrong = [&]<class U, int Rank, class Memory>(operand<U, Rank, Memory>& o) {
    const auto right = o.tensor;
    for (int axis = 0; axis < Rank; ++axis) {
      if ((o.axes >> axis & 1U) == 0) continue;
      o.tensor = gdn::slice(right, axis, 0, right.extent(axis) - 1);
      expect_refused(run, std::string(o.name) + " is shorter along axis " + std::to_string(axis));
    }
    o.tensor = right;
    if (o.unit_stride) {
      o.tensor.stride_[Rank - 1] = 0;
      expect_refused(run, std::string(o.name) + " has stride 0 in its last axis");
    }
    o.tensor = right;
    if (o.data) {
      o.tensor.data_ = nullptr;
      expect_refused(run, std::string(o.name) + " has no data");
    }
    o.tensor = right;
  };
  (make_wrong(operands), ...);
}

}  // namespace gdn_test
