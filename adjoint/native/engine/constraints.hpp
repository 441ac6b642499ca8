// Equations with constraints, F(t, y, y') = 0 or M y' = f(t, y): the error within a step, and how a solve of the latter begins;
// the rules of `integrate/residual.py` and of `StageSolver.first_step`. Constants: POINTS in the step, of each its place THETA, weights of the
// dense output there (VALUES) and of its slope (SLOPES), and RATE; NARROW, NOISE, SEARCHES (rounds for a first step). The family gives, for
// E = F_y' and G = F_y at the start of the step: residual, filtered ((E + h gamma G)^-1 in place), mass_times (E v).
FN S part_of(const double* w, const S* ks, int n) {
  S total = K(0);
  for (int s = 0; s < STAGES; s++) total += K(R(w[s])) * ks[s * N + n];
  return total;
}
// of variables of index 2: their slope is that of the defect of a constraint, divided by h
static void index_two(Attempt& a, const S* size, const S& hg, double rest, S* error, S* part, S* slope) {
  S unclear[N];
  const R* power = a.power;
  S noise = K(0), seen = K(0);
  for (int n = 0; n < N; n++) {
    const S unit = unit_of(a, size[n], n), left = m_max(K(R(TOLERANCE)) * unit, K(R(10 * REAL_EPSILON)) * size[n]), x = K(R(NOISE)) * left / unit;
    noise += x * x;
    const S e = error[n] / unit;
    if (!(power[n] > 0)) seen += e * e;
    part[n] = power[n] > 0 ? K(0) : error[n];
    unclear[n] = power[n] > 0 ? K(0) : x * unit;
  }
  const S weight = root_of(noise) / m_max(root_of(seen), K(R(SMALLEST)));
  mass_times(a, part, slope);
  filtered(a, slope);
  mass_times(a, unclear, part);
  filtered(a, part);
  // what does not come by a slope is there where the others do not move at all; noise of their slopes is in it too
  for (int n = 0; n < N; n++) if (power[n] > 0) {
    const S still = error[n] + slope[n], moved = K(R(rest - 1)) * slope[n];
    const S clear = m_abs(still) / m_max(m_abs(still) + m_abs(part[n]), K(R(SMALLEST)));
    error[n] = still * clear * clear + moved / (K(1) + weight * m_abs(moved / unit_of(a, size[n], n)));
  }
}
// makes ``error`` the larger one of itself and of that within the step; size: of the state. What the step before left in the state is measured by
// the tolerance there, a.left: the size of the state in it
static void inner_error(Attempt& a, const double* t, const double* h, const double* span, const S* size) {
  S *value = a.beside, *slope = value + N, *defect = slope + N, *worst = defect + N, *wide = worst + N, at = K(0), narrow;
  for (int n = 0; n < N; n++) wide[n] = m_max(size[n], a.left[n]);
  const S hg = a.h * K(R(GAMMA));
  // a step over a jump of an algebraic variable that nobody named: it shall be small, and no more can be asked
  for (int l = 0; l < W; l++) {
    const double part = least(BD(fabs)(h[l]) / most((R)(NARROW * span[l]), SMALLEST), 1);
    put(narrow, l, (R)(part * part));
  }
  for (int p = 0; p < POINTS; p++) {
    for (int l = 0; l < W; l++) put(at, l, (R)(t[l] + h[l] * THETA[p]));
    for (int n = 0; n < N; n++) { value[n] = a.y[n] + a.h * part_of(VALUES[p], a.ks, n); slope[n] = part_of(SLOPES[p], a.ks, n); }
    residual(a, at, value, slope, defect);
    a.count(EVALUATED);
    for (int n = 0; n < N; n++) defect[n] = hg * defect[n];
    filtered(a, defect);
    if (a.power) index_two(a, wide, hg, 1 - GAMMA * RATE[p], defect, value, slope);
    for (int n = 0; n < N; n++) worst[n] = p ? m_max(worst[n], m_abs(defect[n])) : m_abs(defect[n]);
  }
  for (int n = 0; n < N; n++) if (!(a.skipped && a.skipped[n])) a.error[n] = m_max(m_abs(a.error[n]), worst[n] * narrow * (unit_of(a, size[n], n) / unit_of(a, wide[n], n)));
}
#if MASS
// the sizes of first steps of M y' = f, in which f is no slope: that is the one of a linearly implicit Euler step in which nothing changes by
// more than a hundredth of its tolerance
static void first_steps(Attempt& a, const double* t, const double* sign, const double* span, const bool* wanted, double* first) {
  Room r(a.work);
  S *x = a.beside, at = K(0), h, speed;
  double width[W], fast[W];
  bool going[W], any = false;
  for (int l = 0; l < W; l++) { width[l] = fast[l] = 1e-3 * span[l]; any |= going[l] = wanted[l]; put(at, l, (R)t[l]); }
  a.f.mass(&a.c, &at, a.y, r.mass);
  a.f.jac(&a.c, &at, a.y, r.J, r.slope);
  for (int round = 0; round < SEARCHES && any; round++) {
    S when;
    for (int l = 0; l < W; l++) { const R s = going[l] ? (R)(sign[l] * width[l]) : 0; put(h, l, s); put(when, l, (R)t[l] + s); }
    a.f.fun(&a.c, &when, a.y, x);
    shifted_matrix(a.f, r.J, h, r.LU, r.P, r.mass);
    solve_shifted(r.LU, r.P, x);
    speed = K(0);
    for (int n = 0; n < N; n++) { const S v = x[n] / unit_of(a, m_abs(a.y[n]), n); speed += v * v; }
    speed = root_of(speed);
    any = false;
    for (int l = 0; l < W; l++) if (going[l]) {
      a.counts[EVALUATED][l]++; a.counts[FACTORISATIONS][l]++; a.counts[SOLVES][l]++;
      fast[l] = get(speed, l);
      const double narrower = 1e-2 / (fast[l] < 1e-300 ? 1e-300 : fast[l]);
      any |= going[l] = narrower < 0.5 * width[l];
      if (going[l]) width[l] = narrower;
    }
  }
  for (int l = 0; l < W; l++) {
    const double x = 0.5 / (fast[l] < 1e-300 ? 1e-300 : fast[l]);
    first[l] = finite(x) ? least(1e-3 * span[l], x) : 1e-6 * span[l];
  }
}
#endif
