// How solves of implicit equations begin, and go on behind a jump: the rules of `ResidualSolver`. Constants: SEARCHES (rounds), and FINDINGS (of
// Newton's iteration in each). The family gives pencil_of an attempt, where matrices are made.
// The slopes of implicit Euler steps so small that nothing changes by more than a hundredth of its tolerance, and how fast that is in units of
// it; width: of the longest such step that comes into question. Algebraic variables have a slope too, which the equations do not give.
static void find_slopes(Attempt& a, const S& t, const double* sign, double* width, const bool* wanted, S* slope, double* fast) {
  const Pencil r = pencil_of(a);
  S *value = a.beside, *change = value + N, step = K(0);
  bool going[W], any = false;
  for (int l = 0; l < W; l++) { any |= going[l] = wanted[l]; fast[l] = 0; }
  for (int n = 0; n < N; n++) slope[n] = K(0);
  for (int round = 0; round < SEARCHES && any; round++) {
    for (int l = 0; l < W; l++) put(step, l, (R)(sign[l] * width[l]));
    const S end = t + step;
    bool moving[W], fine[W], some = true;
    for (int l = 0; l < W; l++) moving[l] = going[l];
    for (int k = 0; k < FINDINGS && some; k++) {
      for (int n = 0; n < N; n++) value[n] = a.y[n] + step * slope[n];
      pencil(a.f, a.c, end, value, slope, r);
      filter_matrix(a.f, r, step);
      residual(a.f, a.c, end, value, slope, r.base, change);
      filter_solve(r, change);
      for (int l = 0; l < W; l++) { fine[l] = true; for (int n = 0; n < N; n++) fine[l] = fine[l] && finite(get(change[n], l)); }
      const M known = mask_of(fine), on = mask_of(moving);
      S length = K(0);
      for (int n = 0; n < N; n++) {
        const S d = m_sel(known, change[n], K(0)), x = step * d / unit_of(a, m_abs(a.y[n]), n);
        slope[n] = m_sel(on, slope[n] - d, slope[n]);
        length += x * x;
      }
      length = root_of(length);
      some = false;
      for (int l = 0; l < W; l++) if (moving[l]) {
        for (int i = 0; i < COUNTS; i++) a.counts[i][l]++;
        some |= moving[l] = !(get(length, l) <= 1e-4);
      }
    }
    S speed = K(0);
    for (int n = 0; n < N; n++) { const S x = as_tested(a, slope[n], step, n) / unit_of(a, m_abs(a.y[n]), n); speed += x * x; }
    speed = root_of(speed);
    any = false;
    for (int l = 0; l < W; l++) if (going[l]) {
      // a state that is not finite says nothing of sizes
      fast[l] = finite(get(speed, l)) ? get(speed, l) : 0;
      const double narrow = least(width[l], 1e-2 / most(fast[l], 1e-300));
      any |= going[l] = !(narrow >= 0.5 * width[l]);
      if (going[l]) width[l] = narrow;
    }
  }
}
