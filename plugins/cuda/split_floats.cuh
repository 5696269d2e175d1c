// Products of float32 by MMAs of tf32, which read ten bits behind the point.
//
// Every operand is split into the number cut to those bits and what was cut off, cut likewise, and of the four products
// the smallest is left out: what is missing is less than 2^-18 of a product. Both parts have the range of a float32, so
// no number is too large; float16, which would be twice as fast, would need scales.
#pragma once

#include "warp.cuh"

namespace planish {

// An operand of an MMA as the sum of two.
template <class Warp, class Fragment>
struct SplitOperand {
    typename Warp::template PerLane<Fragment> large;
    typename Warp::template PerLane<Fragment> small;
};

// Sets a lane's registers of an operand to value_of(reg).
template <class Warp, class Fragment, class ValueOf>
PLANISH_HD void split(SplitOperand<Warp, Fragment>& operand, int lane, ValueOf value_of) {
    constexpr uint32_t kKept = 0xFFFFE000u;
    PLANISH_UNROLL
    for (int reg = 0; reg < static_cast<int>(sizeof(Fragment) / sizeof(uint32_t)); ++reg) {
        const float value = value_of(reg);
        const uint32_t large = bits_of(value) & kKept;
        operand.large[lane].reg[reg] = large;
        operand.small[lane].reg[reg] = bits_of(value - float_of_bits(large)) & kKept;
    }
}

// c += a b, m16n8k8.
template <class Warp>
PLANISH_HD void add_products(typename Warp::template PerLane<FragmentF>& c, const SplitOperand<Warp, FragmentA>& a,
                             const SplitOperand<Warp, FragmentB>& b) {
    Warp::mma_tf32(c, a.small, b.large);
    Warp::mma_tf32(c, a.large, b.small);
    Warp::mma_tf32(c, a.large, b.large);
}

}  // namespace planish
