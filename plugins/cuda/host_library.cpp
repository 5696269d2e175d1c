// The C interface of the packer, for planish.plugins.kernel_layout. Needs no GPU and no CUDA.
//
// `bits` is 2, 3 or 4 throughout; the caller has checked it, and the sizes of all arrays.

#include "repack.cuh"

extern "C" {

int64_t planish_matrix_words(int64_t rows, int64_t channels, int32_t bits) {
    return planish::matrix_words(rows, channels, bits);
}

int64_t planish_padded_channels(int64_t channels, int32_t bits) { return planish::padded_channels(channels, bits); }

void planish_pack_weight(const uint8_t* portable, int64_t rows, int64_t channels, int32_t bits, uint32_t* words,
                         int32_t* row_sums) {
    const auto pack = bits == 2   ? planish::pack_matrix<2>
                      : bits == 3 ? planish::pack_matrix<3>
                                  : planish::pack_matrix<4>;
    pack(portable, rows, channels, words, row_sums);
}

void planish_unpack_weight(const uint32_t* words, int64_t rows, int64_t channels, int32_t bits, uint8_t* codes) {
    const auto unpack = bits == 2   ? planish::unpack_matrix<2>
                        : bits == 3 ? planish::unpack_matrix<3>
                                    : planish::unpack_matrix<4>;
    unpack(words, rows, channels, codes);
}

}  // extern "C"
