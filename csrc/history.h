// What missed steps add up to, so that a row is moved by all of them in one pass.
//
// A row last brought up to date at step s moves in each step j that it misses, n = j - s, by
//
//   step_size_j * b1^n * m / (b2^(n/2) * sqrt(v) * root_scale_j + eps)  =  w_n * m / (d_n * sqrt(v) + eps)
//
// (b1^n and b2^n stand for products of the steps' own betas), after its weights were multiplied by decay_j. The step
// s + 1 may be one that it did not miss, but in which only its moments were written: catch_up_rows.cpp. w_n and d_n
// depend on s and j alone, so sums over n are kept for every s. With x = 1 / (c * sqrt(v) + eps) for any c > 0,
// y = c * sqrt(v) * x and h_n = (d_n - c) / c, the fraction is w_n * x / (1 + h_n * y), and
//
//   sum of w_n / (d_n * sqrt(v) + eps)  =  x * (sum of w_n  -  y * sum of w_n * h_n  +  y^2 * sum of w_n * h_n^2  -
//   ...)
//
// Cut off after kNumTerms, each fraction is off by its own h_n^kNumTerms * y^kNumTerms, where 0 <= y <= 1. So the steps
// are cut into blocks, each with a c of its own, in which all h_n are small enough: one at the default betas, more in
// the first hundreds of steps, in which root_scale changes fast, and with a beta2 far from 1. Where there would be too
// many, steps are walked one by one (catch_up_rows.cpp). docs/replay.md derives the bounds.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sparseadam {

// A step's numbers, in the order of the columns in sparseadam/history.py; logs are sums over all steps so far.
struct StepNumbers {
  double step_size, root_scale, beta1, beta2, eps;
  double log_beta1, log_beta2, log_decay;
};

class MissedSteps;
struct FoundRows;

// The steps that rows may have missed, what they add up to, and the rows last read; nullptrs where missed steps are not
// replayed. The first of the num_steps + 1 entries stands for the step `base`, at which all rows were up to date.
struct History {
  const StepNumbers* steps = nullptr;
  int64_t base = 0;
  int64_t num_steps = 0;
  MissedSteps* missed = nullptr;
  FoundRows* found = nullptr;

  // The table's step so far.
  int64_t step() const { return base + num_steps; }
  // The entry of a clock; that of a new slot is zero, and its row was up to date at the base.
  int64_t entry_of(int32_t clock) const { return clock > base ? clock - base : 0; }
};

// With eight the steps of the default betas are one block, whose terms cost less than the division of a second one.
constexpr int kNumTerms = 8;
// The most blocks that sums have.
constexpr size_t kMaxBlocks = 64;
// As in sparseadam/history.py: r^n below which a missed step only decays weights.
constexpr double kNegligible = 1e-9;

// What share of a row's move, as it would be without eps, sums may be off by. Float tables round each weight by 2**-24
// of itself anyway.
template <class Moment>
constexpr double kTolerance = sizeof(Moment) == sizeof(double) ? 1e-9 : 0x1p-22;

// Missed steps in a row that have one eps and d_n near each other.
struct MissedBlock {
  double center;         // c
  double reach;          // the largest |h| that it takes
  double most_left_out;  // of w/d * |h|^kNumTerms
  double eps;
  double terms[kNumTerms];  // sums of w * h^i
};

// The sums for one step s.
struct MissedSums {
  double scale1 = 1.0, root_scale2 = 1.0;  // b1^n and b2^(n/2) of the last step summed
  double log_decay = 0.0;                  // up to which the sums have been decayed
  double total = 0.0;                      // sum of w/d: what a row would move by if eps were zero
  double largest = 0.0;                    // w/d
  double left_out = 0.0;                   // sum of w/d * |h|^kNumTerms; infinite where there is no block for a step
  MissedBlock first{1.0, 0.0, 0.0, 1.0, {}};
  std::vector<MissedBlock> more;
};

// What moments have been multiplied by: the products of the betas.
struct MomentFactors {
  double first, second;
};

// The sums for every step of a history.
class MissedSteps {
 public:
  // Takes in the steps of a history that are new since the last call, for sums that may be off by `tolerance`, which is
  // the same in all calls.
  void advance(const History& history, double tolerance);

  // Of rows last up to date at entry `s` of the history.
  const MissedSums& at(int64_t s) const { return sums_[static_cast<size_t>(s)]; }

  // Of moments written at an entry, up to the last step of the history.
  MomentFactors moment_factors(const History& history, int64_t written) const {
    const MissedSums& sums = at(written);
    if (static_cast<size_t>(written) >= first_open_) return {sums.scale1, sums.root_scale2 * sums.root_scale2};
    const StepNumbers& last = history.steps[history.num_steps];
    const StepNumbers& then = history.steps[written];
    return {std::exp(last.log_beta1 - then.log_beta1), std::exp(last.log_beta2 - then.log_beta2)};
  }

 private:
  std::vector<MissedSums> sums_;
  // Sums before it are complete: what their rows still miss is negligible.
  size_t first_open_ = 0;
};

}  // namespace sparseadam
