#include "history.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

namespace sparseadam {

namespace {

// The largest |h| of a block that begins with a step whose move is this share of the largest one's. An eighth of the
// tolerance is left to that one; a smaller one matters less and may be off by more, but still by less of the whole.
// With the usual betas all steps come to a tenth of the tolerance, to half of it where the window is short.
double reach_of(double tolerance, double share) {
  constexpr double kMaxReach = 0.5;
  return std::min(kMaxReach, std::pow(tolerance / 8.0, 1.0 / kNumTerms) * std::pow(share, -0.75 / kNumTerms));
}

// What a missed step moves a row by: w * m / (d * sqrt(v) + eps).
struct Move {
  double w, d, eps;

  double without_eps() const { return std::fabs(w) / d; }
  double h(const MissedBlock& block) const { return (d - block.center) / block.center; }
};

// What a block leaves out of a move, were eps zero. Where eps counts the move is less, and so is that.
double left_out_by(const MissedBlock& block, const Move& move) {
  static_assert(kNumTerms == 8, "h^8 is squared thrice");
  const double h2 = move.h(block) * move.h(block);
  const double h4 = h2 * h2;
  return move.without_eps() * (h4 * h4);
}

MissedBlock begin_block(const MissedSums& sums, const Move& move, double tolerance) {
  const double reach = reach_of(tolerance, move.without_eps() / sums.largest);
  // d falls with n, but for changes of beta2.
  MissedBlock block{move.d / (1.0 + reach), reach, 0.0, move.eps, {}};
  block.most_left_out = left_out_by(block, move);
  return block;
}

bool takes(const MissedBlock& block, const Move& move) {
  return block.eps == move.eps && std::fabs(move.h(block)) <= block.reach &&
         left_out_by(block, move) <= block.most_left_out;
}

// The block for a move: the last one, or a new one, or none where there are too many or no memory is left.
MissedBlock* block_for(MissedSums& sums, const Move& move, double tolerance) {
  std::vector<MissedBlock>& more = sums.more;
  MissedBlock& last = more.empty() ? sums.first : more.back();
  if (takes(last, move)) return &last;
  if (sums.total == 0.0) {
    sums.first = begin_block(sums, move, tolerance);
    return &sums.first;
  }
  if (more.size() + 1 == kMaxBlocks) return nullptr;
  try {
    more.push_back(begin_block(sums, move, tolerance));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
  return &more.back();
}

void add_move(MissedSums& sums, const Move& move, double tolerance) {
  sums.largest = std::max(sums.largest, move.without_eps());
  MissedBlock* block = block_for(sums, move, tolerance);
  if (block == nullptr) {
    sums.left_out = std::numeric_limits<double>::infinity();
    return;
  }
  const double h = move.h(*block);
  double term = move.w;
  for (double& sum : block->terms) {
    sum += term;
    term *= h;
  }
  sums.left_out += left_out_by(*block, move);
  sums.total += move.without_eps();
}

void decay_block(MissedBlock& block, double decay) {
  for (double& term : block.terms) term *= decay;
  block.most_left_out *= decay;
}

// Decays what was summed before this step.
void decay_sums(MissedSums& sums, double decay) {
  decay_block(sums.first, decay);
  for (MissedBlock& block : sums.more) decay_block(block, decay);
  sums.total *= decay;
  sums.largest *= decay;
  sums.left_out *= decay;
}

// Adds a missed step of the rows that `sums` is for.
void add_step(MissedSums& sums, const StepNumbers& step, double root_beta2, double decay, double tolerance) {
  sums.scale1 *= step.beta1;
  sums.root_scale2 *= root_beta2;
  if (decay != 1.0) decay_sums(sums, decay);
  sums.log_decay = step.log_decay;
  const double w = step.step_size * sums.scale1;
  if (w != 0.0) add_move(sums, {w, step.root_scale * sums.root_scale2, step.eps}, tolerance);
}

}  // namespace

void MissedSteps::advance(const History& history, double tolerance) {
  const StepNumbers* steps = history.steps;
  const auto num_entries = static_cast<size_t>(history.num_steps) + 1;
  // Here and not below, so that no failure comes between the sums of one step.
  if (sums_.capacity() < num_entries) sums_.reserve(std::max(num_entries, 2 * sums_.capacity()));
  if (sums_.empty()) sums_.emplace_back();
  for (size_t j = sums_.size(); j < num_entries; ++j) {
    const StepNumbers& step = steps[j];
    const double root_beta2 = std::sqrt(step.beta2);
    const double decay = std::exp(step.log_decay - steps[j - 1].log_decay);
    for (size_t s = first_open_; s < j; ++s) add_step(sums_[s], step, root_beta2, decay, tolerance);
    // The products of later entries have fewer factors below 1, so the entries still open are the last ones.
    while (first_open_ < j && !(sums_[first_open_].scale1 >= kNegligible * sums_[first_open_].root_scale2)) {
      ++first_open_;
    }
    sums_.emplace_back();
    sums_.back().log_decay = step.log_decay;
  }
}

}  // namespace sparseadam
