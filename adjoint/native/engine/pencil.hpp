// The matrices E = F_y' and G = F_y of equations F(t, y, y') = 0, and what is solved with E + h c G: with IMPLICIT fun is F of y and y' side by
// side, without it F = y' - fun(t, y). After `linalg/pencil.py`.
#define ARGUMENTS ((1 + IMPLICIT) * N)
#define ROOM_OF_JACOBIAN ((1 + IMPLICIT) * ENTRIES)
#define ROOM_OF_PENCIL (ROOM_OF_JACOBIAN + room_of_factors(1) + EXCHANGES + 7 * (long)N)
struct Pencil {
  S *J, *filter, *P, *scale, *base, *point;
  Pencil(S* at) : J(at), filter(J + ROOM_OF_JACOBIAN), P(filter + room_of_factors(1)), scale(P + EXCHANGES), base(scale + N), point(base + 2 * N) {}
};
FN S E_of(const S* J, const At& at) { return IMPLICIT ? J[at.entry + BESIDE] : at.i == at.j ? K(1) : K(0); }
FN S G_of(const S* J, const At& at) { return IMPLICIT ? J[at.entry] : -J[at.entry]; }
// E v
FN S mass_row(const S* J, const S* v, int n) {
  if (!IMPLICIT) return v[n];
  S total = K(0);
  row_of(n, [&](const At& at) { total += E_of(J, at) * v[at.j]; });
  return total;
}
// F(t, y, y'); pair: room for y and y' side by side
FN void residual(const Functions& f, const Ctx& c, const S& t, const S* y, const S* slope, S* pair, S* out) {
  if (IMPLICIT) {
    for (int n = 0; n < N; n++) { pair[n] = y[n]; pair[N + n] = slope[n]; }
    f.fun(&c, &t, pair, out);
  } else {
    f.fun(&c, &t, y, out);
    for (int n = 0; n < N; n++) out[n] = slope[n] - out[n];
  }
}
// the matrices E and G
FN void pencil(const Functions& f, const Ctx& c, const S& t, const S* y, const S* slope, const Pencil& r) {
  for (int n = 0; n < N && IMPLICIT; n++) { r.base[n] = y[n]; r.base[N + n] = slope[n]; }
  f.jac(&c, &t, IMPLICIT ? r.base : y, r.J, r.point);
}
// the factors of E + h c G
static void filter_matrix(const Functions& f, const Pencil& r, const S hc) {
  fill<1>(r.filter, 0, [&](const At& at) { return E_of(r.J, at) + hc * G_of(r.J, at); });
  factorise_filled<1>(f, r.filter, r.P, IMPLICIT ? r.scale : nullptr);
}
FN void filter_solve(const Pencil& r, S* x) {
  for (int n = 0; n < N && IMPLICIT; n++) x[n] = r.scale[n] * x[n];
  solve_filled<1>(r.filter, r.P, x);
}
// changes of the state as the norm of the iteration sees them: variables of index 2 count |h| times less; and errors as the test sees them
FN S as_seen(const Attempt& a, const S& x, const S& h, int n) { return CONSTRAINED && a.power && a.power[n] != 0 ? x * m_pow(m_abs(h), K(a.power[n])) : x; }
FN S as_tested(const Attempt& a, const S& x, const S& h, int n) { return CONSTRAINED && a.skipped && a.skipped[n] ? K(0) : as_seen(a, x, h, n); }
