// What stays the same over a whole call of the engine.
#pragma once

#include "qconv/product.h"
#include "qconv/qconv.h"

namespace bitorch_engine {

struct Call {
  const Product& product;
  const uint8_t* image;
  const uint8_t* weights;  // arranged: packed, or codes where bits is 8
  int bits;
  int64_t largest, largest_weight;  // of the image's bytes, and of the weights' magnitudes
  const int32_t* sums;              // of be_qconv_arrange
  int zero;                         // what the image is padded with
  Epilogue epilogue;                // pointers to the first of all, but for zero_sum: each region has its own
  const float* sample_factor;       // one a sample, or null
  uint8_t* out;
  int64_t out_sample, out_channel, out_step[3];  // strides of the result in elements
  int64_t element_bytes;

  int64_t pairs() const { return pairs_that_fit(largest, largest_weight); }
};

}  // namespace bitorch_engine
