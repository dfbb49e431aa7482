#include "history.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace sparseadam {

namespace {

// How much of the window the first block takes: what is left of a fraction falls with n, so it may be the shorter one.
constexpr double kFirstBlockShare = 0.3;

// Steps in a window if all were like this one.
double window_of(double beta1, double root_beta2) {
  const double ratio = beta1 / root_beta2;
  return ratio > kNegligible ? std::max(1.0, std::ceil(std::log(kNegligible) / std::log(ratio))) : 1.0;
}

// Decays what was summed before this step.
void decay_sums(MissedSums& sums, double decay) {
  for (auto& block : sums.centered) {
    for (double& term : block) term *= decay;
  }
  for (double& power : sums.powers) power *= decay;
  sums.centered_error *= decay;
}

// Adds missed step number n of the rows that `sums` is for.
void add_step(MissedSums& sums, int64_t n, const StepNumbers& step, double root_beta2, double decay) {
  sums.scale1 *= step.beta1;
  sums.root_scale2 *= root_beta2;
  const double w = step.step_size * sums.scale1;
  const double d = step.root_scale * sums.root_scale2;
  if (n == 1) {
    const double window = window_of(step.beta1, root_beta2);
    sums.split = std::max<int64_t>(1, static_cast<int64_t>(kFirstBlockShare * window));
    const auto split = static_cast<double>(sums.split);
    sums.eps = step.eps;
    sums.center[0] = d * std::pow(root_beta2, (split - 1.0) / 2.0);
    sums.center[1] = d * std::pow(root_beta2, (split + window) / 2.0);
  }
  if (step.eps != sums.eps) sums.eps = std::numeric_limits<double>::quiet_NaN();
  if (decay != 1.0) decay_sums(sums, decay);
  sums.log_decay = step.log_decay;

  const int block = n <= sums.split ? 0 : 1;
  const double h = (d - sums.center[block]) / sums.center[block];
  double term = w;
  for (double& sum : sums.centered[block]) {
    sum += term;
    term *= h;
  }
  sums.centered_error += std::fabs(term) / d;
  double power = w / d;
  for (double& sum : sums.powers) {
    sum += power;
    power /= d;
  }
}

}  // namespace

void MissedSteps::advance(const History& history) {
  const StepNumbers* steps = history.steps;
  const auto num_entries = static_cast<size_t>(history.num_steps) + 1;
  // Here and not below, so that no failure comes between the sums of one step.
  if (sums_.capacity() < num_entries) sums_.reserve(std::max(num_entries, 2 * sums_.capacity()));
  if (sums_.empty()) sums_.emplace_back();
  for (size_t j = sums_.size(); j < num_entries; ++j) {
    const StepNumbers& step = steps[j];
    const double root_beta2 = std::sqrt(step.beta2);
    const double decay = std::exp(step.log_decay - steps[j - 1].log_decay);
    for (size_t s = first_open_; s < j; ++s) add_step(sums_[s], static_cast<int64_t>(j - s), step, root_beta2, decay);
    // The products of later entries have fewer factors below 1, so the entries still open are the last ones.
    while (first_open_ < j && !(sums_[first_open_].scale1 >= kNegligible * sums_[first_open_].root_scale2)) {
      ++first_open_;
    }
    sums_.emplace_back();
    sums_.back().log_decay = step.log_decay;
  }
}

}  // namespace sparseadam
