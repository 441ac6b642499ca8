// Sparse matrices of the state's Jacobian, and of COPIES of it, by a pattern that is the same for all (native/sparse.py). Rows of the factors are
// equations in the order EQUATION, columns unknowns in the order UNKNOWN; nothing is exchanged. With COPIES an entry is a block, one row and
// one column for every copy. Entries of a row of the Jacobian are ROWS[i] to ROWS[i + 1], in columns COLUMNS, and stand at PLACE in the factors. Row
// r of these is from START[r] on: below the diagonal the columns of its pieces (PIECES: first, last; PIECE[r] to PIECE[r + 1]), which lie each
// in one group of rows; the inverse of its diagonal, at MIDDLE[r]; and above it the rest of its own group (GROUP[r], to LAST), and the
// runs of columns that all rows of the group have (RUNS: first, how many; RUN[g] to RUN[g + 1]).
// loops over runs and blocks gain by what compilers do at this level alone
#pragma GCC push_options
#pragma GCC optimize("O3")
#define APART __attribute__((noinline))
enum { BESIDE = ENTRIES };
#define EXCHANGES 1
constexpr long room_of_rows(int) { return 1; }
// behind the factors the entries of the matrix, and for each lane whether solutions are made better by what they leave of it
constexpr long room_of_factors(int copies) { return (long)copies * copies * (FACTORS + ENTRIES) + 1; }
FN S& first_part(S& x) { return x; }
FN S& first_part(Complex& x) { return x.re; }
template <int COPIES, class V> FN S& unsharp(const V* factors) { return first_part(((V*)factors)[(long)COPIES * COPIES * (FACTORS + ENTRIES)]); }
template <class F> FN void row_of(int i, const F& f) { for (long e = ROWS[i]; e < ROWS[i + 1]; e++) f(At{i, COLUMNS[e], e, 0}); }

// blocks, and what they multiply
template <int C> struct Column { S v[C]; };
template <int C> struct Block { S a[C][C]; };
template <int C> FN Column<C> operator+(const Column<C>& x, const Column<C>& y) { Column<C> r; for (int i = 0; i < C; i++) r.v[i] = x.v[i] + y.v[i]; return r; }
template <int C> FN Column<C> operator-(const Column<C>& x, const Column<C>& y) { Column<C> r; for (int i = 0; i < C; i++) r.v[i] = x.v[i] - y.v[i]; return r; }
template <int C> FN Column<C> operator*(const Block<C>& b, const Column<C>& x) {
  Column<C> r;
  for (int i = 0; i < C; i++) { r.v[i] = b.a[i][0] * x.v[0]; for (int j = 1; j < C; j++) r.v[i] += b.a[i][j] * x.v[j]; }
  return r;
}
template <int C> FN Block<C> operator-(const Block<C>& x, const Block<C>& y) { Block<C> r; for (int i = 0; i < C; i++) for (int j = 0; j < C; j++) r.a[i][j] = x.a[i][j] - y.a[i][j]; return r; }
template <int C> FN Block<C> operator*(const Block<C>& x, const Block<C>& y) {
  Block<C> r;
  for (int i = 0; i < C; i++) for (int j = 0; j < C; j++) { r.a[i][j] = x.a[i][0] * y.a[0][j]; for (int k = 1; k < C; k++) r.a[i][j] += x.a[i][k] * y.a[k][j]; }
  return r;
}
template <int C> APART static Block<C> inverse(Block<C> b) {
  Block<C> r;
  S P[room_of_exchanges(C)];
  factorise<C>(&b.a[0][0], P);
  for (int j = 0; j < C; j++) {
    S x[C];
    for (int i = 0; i < C; i++) x[i] = K(R(i == j));
    solve_lu<C>(&b.a[0][0], P, x);
    for (int i = 0; i < C; i++) r.a[i][j] = x[i];
  }
  return r;
}
// times the transpose
FN S transposed(const S& a, const S& x) { return a * x; }
FN Complex transposed(const Complex& a, const Complex& x) { return a * x; }
template <int C> FN Column<C> transposed(const Block<C>& b, const Column<C>& x) {
  Column<C> r;
  for (int j = 0; j < C; j++) { r.v[j] = b.a[0][j] * x.v[0]; for (int i = 1; i < C; i++) r.v[j] += b.a[i][j] * x.v[i]; }
  return r;
}
template <int C> FN void clear(Column<C>& x) { for (int i = 0; i < C; i++) x.v[i] = K(0); }

// an entry of the factors of COPIES, what it multiplies, and of each row the part of a copy
template <int COPIES, class V> struct Of {
  typedef Block<COPIES> T; typedef Column<COPIES> X; typedef Column<COPIES> Size;
  static S& number(T& b, int i, int j) { return b.a[i][j]; }
  static S& part(X& x, int i) { return x.v[i]; }
};
template <class V> struct Of<1, V> {
  typedef V T; typedef V X; typedef S Size;
  static V& number(V& b, int, int) { return b; }
  static V& part(V& x, int) { return x; }
  static S& part(Column<1>& x, int) { return x.v[0]; }
};
template <int COPIES, class V, class Entry> FN void fill(V* LU, int copy, const Entry& entry) {
  typedef Of<COPIES, V> O;
  typename O::T* to = (typename O::T*)LU;
  for (long e = 0; e < FACTORS; e++) for (int j = 0; j < COPIES; j++) clear(O::number(to[e], copy, j));
  for (int i = 0; i < N; i++) for (long e = ROWS[i]; e < ROWS[i + 1]; e++)
    for (int j = 0; j < COPIES; j++) O::number(to[PLACE[e]], copy, j) = entry(At{i, COLUMNS[e], e, j});
}
// places of a row of the factors: those below the diagonal and above it, each with its column
template <class F> FN void below(int r, const F& f) { long p = START[r]; for (int s = PIECE[r]; s < PIECE[r + 1]; s++) for (int k = PIECES[2 * s]; k <= PIECES[2 * s + 1]; k++) f(p++, k); }
template <class F> FN void above(int r, const F& f) {
  const int g = GROUP[r];
  long p = MIDDLE[r] + 1;
  for (int j = r + 1; j <= LAST[g]; j++) f(p++, j);
  for (int s = RUN[g]; s < RUN[g + 1]; s++) for (int j = RUNS[2 * s], end = j + RUNS[2 * s + 1]; j < end; j++) f(p++, j);
}
// numbers of size one, unlike each other
FN S trial(int column, int copy) { const unsigned x = (column * 5u + copy + 1u) * 2654435761u; return K(R((x >> 31 ? 1 : -1) * (0.5 + (x >> 8 & 0xffff) * 0x1p-16))); }
#if W == 1
FN bool holds(M x, int) { return x; }
#else
FN bool holds(const M& x, int l) { return x[l]; }
#endif
// Of rows k to last of a group, which have the multipliers w[k] ...: these times what is above the diagonal, from w.
template <class V> APART static void eliminate(const V* __restrict LU, V* __restrict w, int k, int last) {
  const int g = GROUP[k], end = LAST[g];
  for (int i = k; i <= last; i++) {
    const V x = w[i] = w[i] * LU[MIDDLE[i]], *u = LU + MIDDLE[i] - i;
    for (int j = i + 1; j <= end; j++) w[j] = w[j] - x * u[j];
  }
  long at = 0;
  for (int s = RUN[g]; s < RUN[g + 1]; s++) {
    V* to = w + RUNS[2 * s];
    const int many = RUNS[2 * s + 1];
    int i = k;
    for (; i + 3 <= last; i += 4) {
      const V a = w[i], b = w[i + 1], c = w[i + 2], d = w[i + 3];
      const V *u = LU + MIDDLE[i] + 1 + end - i + at, *v = LU + MIDDLE[i + 1] + end - i + at, *x = LU + MIDDLE[i + 2] + end - i - 1 + at, *y = LU + MIDDLE[i + 3] + end - i - 2 + at;
#pragma GCC ivdep
      for (int j = 0; j < many; j++) to[j] = to[j] - a * u[j] - b * v[j] - c * x[j] - d * y[j];
    }
    for (; i <= last; i++) {
      const V a = w[i], *u = LU + MIDDLE[i] + 1 + end - i + at;
#pragma GCC ivdep
      for (int j = 0; j < many; j++) to[j] = to[j] - a * u[j];
    }
    at += many;
  }
}
// Factors L U, and whether they are that: rows of both times a vector, beside those of the matrix. Lanes where they are not (a pivot is all but zero,
// or multipliers have grown) solve nothing, and are told of; where multipliers have grown less, what rounding has spoilt is mended by each solve.
template <int COPIES, class V> APART static void factorise_filled(const Functions& f, V* factors, V*, S* scale) {
  typedef Of<COPIES, V> O;
  typedef typename O::T T;
  typedef typename O::X X;
  T* LU = (T*)factors;
  T w[N];
  X image[N];
  M good = KM(true), sharp = KM(true);
  for (int r = 0; r < N; r++) {
    const int n = EQUATION[r];
    S size[COPIES];
    if (scale) {
      for (int i = 0; i < COPIES; i++) {
        S largest = K(0);
        for (long e = ROWS[n]; e < ROWS[n + 1]; e++) for (int j = 0; j < COPIES; j++) largest = m_max(largest, modulus(O::number(LU[PLACE[e]], i, j)));
        size[i] = scale[i * N + n] = m_sel((M)(largest > K(0)), K(1) / largest, K(1));
      }
      for (long e = ROWS[n]; e < ROWS[n + 1]; e++) for (int i = 0; i < COPIES; i++) for (int j = 0; j < COPIES; j++) {
        auto& x = O::number(LU[PLACE[e]], i, j);
        x = times(x, size[i]);
      }
    }
    X wanted, found;
    clear(wanted); clear(found);
    for (int i = 0; i < COPIES; i++) size[i] = K(0);
    for (long e = ROWS[n]; e < ROWS[n + 1]; e++) for (int i = 0; i < COPIES; i++) for (int j = 0; j < COPIES; j++) {
      auto& x = O::number(LU[PLACE[e]], i, j);
      O::part(wanted, i) = O::part(wanted, i) + times(x, trial(COLUMN[e], j));
      size[i] += modulus(x);
    }
    for (long e = ROWS[n]; e < ROWS[n + 1]; e++) LU[FACTORS + e] = LU[PLACE[e]];
    below(r, [&](long p, int c) { w[c] = LU[p]; });
    w[r] = LU[MIDDLE[r]];
    above(r, [&](long p, int c) { w[c] = LU[p]; });
    for (int s = PIECE[r]; s < PIECE[r + 1]; s++) eliminate(LU, w, PIECES[2 * s], PIECES[2 * s + 1]);
    auto add = [&](X& to, const T& by, int c) {
      T copy = by;
      for (int i = 0; i < COPIES; i++) for (int j = 0; j < COPIES; j++) O::part(to, i) = O::part(to, i) + times(O::number(copy, i, j), trial(c, j));
    };
    add(found, w[r], r);
    above(r, [&](long p, int c) { LU[p] = w[c]; add(found, w[c], c); });
    image[r] = found;
    below(r, [&](long p, int c) { LU[p] = w[c]; found = found + w[c] * image[c]; });
    LU[MIDDLE[r]] = inverse(w[r]);
    const X off = found - wanted;
    for (int i = 0; i < COPIES; i++) {
      X copy = off;
      // what is no number is none of the matrix either
      good = (M)(good & ((M)(modulus(O::part(copy, i)) <= K(R(GOOD)) * size[i]) | m_not((M)(size[i] <= K(R(LARGEST))))));
      sharp = (M)(sharp & (M)(modulus(O::part(copy, i)) <= K(R(SHARP)) * size[i]));
    }
  }
  unsharp<COPIES>(factors) = m_sel(sharp, K(0), K(1));
  bool fine[W], all = true;
  for (int l = 0; l < W; l++) all &= fine[l] = holds(good, l);
  if (all) return;
  if (f.lost) __atomic_store_n(f.lost, 1, __ATOMIC_RELAXED);
  const M on = mask_of(fine);
  for (int i = 0; i < COPIES; i++) for (int j = 0; j < COPIES; j++) {
    auto& x = O::number(LU[MIDDLE[0]], i, j);
    x = times(x, m_sel(on, K(1), K(NOT_A_NUMBER)));
  }
}
// z, in the order of the factors, becomes what they make of it
template <int COPIES, bool TRANSPOSED, class V> FN void through(const typename Of<COPIES, V>::T* LU, typename Of<COPIES, V>::X* z) {
  typedef typename Of<COPIES, V>::X X;
  if (TRANSPOSED) {
    for (int r = 0; r < N; r++) {
      const X v = z[r] = transposed(LU[MIDDLE[r]], z[r]);
      above(r, [&](long p, int c) { z[c] = z[c] - transposed(LU[p], v); });
    }
    for (int r = N - 1; r >= 0; r--) {
      const X v = z[r];
      below(r, [&](long p, int c) { z[c] = z[c] - transposed(LU[p], v); });
    }
  } else {
    for (int r = 0; r < N; r++) {
      X v = z[r];
      below(r, [&](long p, int c) { v = v - LU[p] * z[c]; });
      z[r] = v;
    }
    for (int r = N - 1; r >= 0; r--) {
      X v = z[r];
      above(r, [&](long p, int c) { v = v - LU[p] * z[c]; });
      z[r] = LU[MIDDLE[r]] * v;
    }
  }
}
// a solution z of the system with the right-hand side b, made better (Higham 2002, chapter 12) where factors are not sharp
template <int COPIES, bool TRANSPOSED, class V> APART static void refine(const V* factors, typename Of<COPIES, V>::X* b, typename Of<COPIES, V>::X* z) {
  typedef Of<COPIES, V> O;
  const typename O::T* LU = (const typename O::T*)factors;
  const M on = (M)(unsharp<COPIES>(factors) > K(0));
  for (int r = 0; r < N; r++) for (long e = ROWS[EQUATION[r]]; e < ROWS[EQUATION[r] + 1]; e++) {
    const typename O::T& x = LU[FACTORS + e];
    if (TRANSPOSED) b[COLUMN[e]] = b[COLUMN[e]] - transposed(x, z[r]);
    else b[r] = b[r] - x * z[COLUMN[e]];
  }
  through<COPIES, TRANSPOSED, V>(LU, b);
  for (int r = 0; r < N; r++) for (int i = 0; i < COPIES; i++) {
    auto& to = O::part(z[r], i);
    to = m_sel(on, to + O::part(b[r], i), to);
  }
}
template <int COPIES, bool TRANSPOSED = false, class V> APART static void solve_filled(const V* factors, const V*, V* x) {
  typedef Of<COPIES, V> O;
  typedef typename O::X X;
  X z[N], b[N];
  for (int r = 0; r < N; r++) for (int i = 0; i < COPIES; i++) O::part(z[r], i) = x[i * N + (TRANSPOSED ? UNKNOWN : EQUATION)[r]];
  const bool again = !nothing(unsharp<COPIES>(factors));
  if (again) for (int r = 0; r < N; r++) b[r] = z[r];
  through<COPIES, TRANSPOSED, V>((const typename O::T*)factors, z);
  if (again) refine<COPIES, TRANSPOSED>(factors, b, z);
  for (int r = 0; r < N; r++) for (int i = 0; i < COPIES; i++) x[i * N + (TRANSPOSED ? EQUATION : UNKNOWN)[r]] = O::part(z[r], i);
}
template <class V> FN V inverse_pivot(const V* LU, int n) { return LU[MIDDLE[n]]; }
#pragma GCC pop_options
