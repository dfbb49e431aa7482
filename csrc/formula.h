// Adam's formula, element by element: the only place of the native backend where it stands.
#pragma once

#include <cmath>

#include "element.h"
#include "row_update.h"

namespace sparseadam {

// The numbers of one row.
template <class Moment>
struct Scalars {
  Moment beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, root_scale, eps, decay;

  explicit Scalars(const StepScalars& from)
      : beta1(static_cast<Moment>(from.beta1)),
        one_minus_beta1(static_cast<Moment>(from.one_minus_beta1)),
        beta2(static_cast<Moment>(from.beta2)),
        one_minus_beta2(static_cast<Moment>(from.one_minus_beta2)),
        step_size(static_cast<Moment>(from.step_size)),
        root_scale(static_cast<Moment>(from.root_scale)),
        eps(static_cast<Moment>(from.eps)),
        decay(static_cast<Moment>(from.decay)) {}
};

// The formula, element by element.
template <class Moment>
SPARSEADAM_INLINE Moment next_exp_avg(Moment exp_avg, Moment grad, const Scalars<Moment>& scalars) {
  return scalars.beta1 * exp_avg + scalars.one_minus_beta1 * grad;
}
template <class Moment>
SPARSEADAM_INLINE Moment next_exp_avg_sq(Moment exp_avg_sq, Moment square, const Scalars<Moment>& scalars) {
  return scalars.beta2 * exp_avg_sq + scalars.one_minus_beta2 * square;
}
template <class Moment>
SPARSEADAM_INLINE Moment denominator(Moment exp_avg_sq, const Scalars<Moment>& scalars) {
  return std::sqrt(exp_avg_sq) * scalars.root_scale + scalars.eps;
}
template <class Moment>
SPARSEADAM_INLINE Moment next_weight(Moment weight, Moment exp_avg, Moment denom, const Scalars<Moment>& scalars) {
  return scalars.decay * weight - scalars.step_size * exp_avg / denom;
}

}  // namespace sparseadam
