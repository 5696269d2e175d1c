// From sums of unsigned codes to the products they stand for.
//
// With unsigned codes q and zero points z, over all (padded) input channels k,
//
//     sum (a_k - za) (w_k - zw) = sum a_k w_k - zw sum a_k - za sum (w_k - zw).
//
// The first term is what the tensor cores give, sum a_k comes with the token, sum (w_k - zw) with the weight row.
// Everything is exact in int32: |a| <= 255 and |w| <= 15 leave room for 561,000 channels.
#pragma once

#include "portable.cuh"

namespace planish {

// What the algebra needs of a token in a segment: its zero point and the sum of its codes, padding included.
struct TokenSum {
    int32_t zero;
    int32_t sum;
};

// The zero point of symmetric codes.
PLANISH_HD constexpr int32_t zero_point(int bits) { return 1 << (bits - 1); }

// `products` is sum a_k w_k, `row_sum` is sum (w_k - zw).
PLANISH_HD constexpr int32_t centred(int32_t products, TokenSum token, int32_t weight_zero, int32_t row_sum) {
    return products - weight_zero * token.sum - token.zero * row_sum;
}

// The output of a linear: the multiplications and their order are those of PlanishMatMul, so that results agree bit by
// bit. The second is not joined with the addition of another segment, which is behind it.
PLANISH_HD float scaled(int32_t product, float weight_scale, float token_scale) {
    return product_of(product_of(static_cast<float>(product), weight_scale), token_scale);
}

}  // namespace planish
