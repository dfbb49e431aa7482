// Initial values of rows, functions of seed, row and column: `sparseadam/initial.py` has the formulas and the same code
// in PyTorch operations, with the same bits.
#pragma once

#include <cstdint>

namespace sparseadam {

enum class Distribution { kNormal, kUniform };

// Writes the values of some rows, [num_rows, width], rounded to T once: float or double.
template <class T>
void initial_values(Distribution distribution, double scale, uint64_t seed, const int64_t* rows, int64_t num_rows,
                    int64_t width, T* values);

}  // namespace sparseadam
