// Full and banded matrices of the state's Jacobian, and of COPIES of it, one for every stage: unknown n of copy i is number i * N + n. Where entries lie within
// BELOW and ABOVE of the diagonal in the ORDER of unknowns (native/bands.py), rows and columns are in it, copies of an unknown side by side.
enum { BANDED = BELOW < N - 1 || ABOVE < N - 1 };
template <int COPIES> struct Sizes {
  static constexpr int D = COPIES * N, LOW = BANDED ? COPIES * BELOW + COPIES - 1 : D - 1, UP = BANDED ? COPIES * ABOVE + COPIES - 1 : D - 1;
  static constexpr bool MOVED = BANDED && (REORDERED || COPIES > 1);
  static int unknown(int r) { return MOVED ? r % COPIES * N + (REORDERED ? ORDER[r / COPIES] : r / COPIES) : r; }
};
#define ENTRIES (N * (long)N)
constexpr long room_of_factors(int copies) { return (long)copies * N * copies * N; }
enum { BESIDE = N };
FN At at_of(int i, int j) { return {i % N, j % N, i % N * (1 + IMPLICIT) * N + j % N, j / N}; }
// all entries of a row of the Jacobian
template <class F> FN void row_of(int i, const F& f) { for (int j = 0; j < N; j++) f(At{i, j, i * (1 + IMPLICIT) * N + j, 0}); }
template <class V> FN V inverse_pivot(const V* LU, int n) { return LU[n * N + n]; }
// the rows of one copy, from entries
template <int COPIES, class V, class Entry> FN void fill(V* LU, int copy, const Entry& entry) {
  typedef Sizes<COPIES> Z;
  for (int r = 0; r < Z::D; r++) {
    const int i = Z::unknown(r), last = last_of(Z::D, r, Z::UP), end = last_of(Z::D, r, Z::LOW + Z::UP);
    if (COPIES > 1 && i / N != copy) continue;
    for (int c = r > Z::LOW ? r - Z::LOW : 0; c <= last; c++) LU[r * Z::D + c] = entry(at_of(i, Z::unknown(c)));
    for (int c = last + 1; c <= end; c++) clear(LU[r * Z::D + c]);
  }
}
// with scale: of the matrix with rows so scaled that the largest entry of each is one, whatever the units of the equations: x = scale * b before
// a solve
template <int COPIES, class V> static void factorise_filled(const Functions&, V* LU, V* P, S* scale) {
  typedef Sizes<COPIES> Z;
  for (int r = 0; r < Z::D && scale; r++) {
    const int from = r > Z::LOW ? r - Z::LOW : 0, last = last_of(Z::D, r, Z::UP);
    S largest = K(0);
    for (int c = from; c <= last; c++) largest = m_max(largest, modulus(LU[r * Z::D + c]));
    const S by = scale[Z::unknown(r)] = m_sel((M)(largest > K(0)), K(1) / largest, K(1));
    for (int c = from; c <= last; c++) LU[r * Z::D + c] = times(LU[r * Z::D + c], by);
  }
  factorise<Z::D, Z::LOW, Z::UP>(LU, P);
}
constexpr long room_of_rows(int copies) { return room_of_exchanges(copies * N); }
#define EXCHANGES room_of_rows(1)
template <int COPIES, bool TRANSPOSED = false, class V> static void solve_filled(const V* LU, const V* P, V* x) {
  typedef Sizes<COPIES> Z;
  V ordered[Z::MOVED ? Z::D : 1], *z = Z::MOVED ? ordered : x;
  if (Z::MOVED) for (int r = 0; r < Z::D; r++) z[r] = x[Z::unknown(r)];
  if (TRANSPOSED) solve_transposed<Z::D, Z::LOW, Z::UP>(LU, P, z);
  else solve_lu<Z::D, Z::LOW, Z::UP>(LU, P, z);
  if (Z::MOVED) for (int r = 0; r < Z::D; r++) x[Z::unknown(r)] = z[r];
}
