// the factors of I - hd J, or with a matrix of mass - hd J; of I where hd is zero
static void shifted_matrix(const Functions& f, const S* J, const S hd, S* LU, S* P, const S* mass = nullptr) {
  fill<1>(LU, 0, [&](const At& at) {
    S one = at.i == at.j ? K(1) : K(0);
    if (mass) one = m_sel((M)(hd == K(0)), one, mass[at.i * N + at.j]);
    return one - hd * J[at.entry];
  });
  factorise_filled<1>(f, LU, P, nullptr);
}
template <bool TRANSPOSED = false> FN void solve_shifted(const S* LU, const S* P, S* x) { solve_filled<1, TRANSPOSED>(LU, P, x); }
