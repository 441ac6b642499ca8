// What the loop forward and the one back share: lanes, memory, threads. N: numbers in a state; INPUTS, and which of them every trajectory has
// for itself, with how many numbers (OWN[k], else 0); W lanes, each of which holds one trajectory; R a number, S one of every lane.
#if W == 1
FN R get(const S& x, int) { return x; }
FN void put(S& x, int, R v) { x = v; }
#else
FN R get(const S& x, int l) { return x[l]; }
FN void put(S& x, int l, R v) { x[l] = v; }
#endif
FN double least(double a, double b) { return a < b ? a : b; }
FN double most(double a, double b) { return a > b ? a : b; }
FN bool finite(double x) { return BD(fabs)(x) <= 1.7976931348623157e308; }
FN R beside(R x, double toward) { return BI(nextafter)(x, (R)toward); }
#if DEVICE
#define PREFETCH(...)
#else
#define PREFETCH __builtin_prefetch
#endif

// b_i(theta) of the dense output, and their slopes
#if !LEGENDRE
FN void dense_weights(double theta, double* w) {
  for (int i = 0; i < ALL; i++) {
    double total = 0;
    for (int m = DEGREE - 1; m >= 0; m--) total = (total + DENSE[i][m]) * theta;
    w[i] = total;
  }
}
FN void dense_slopes(double theta, double* w) {
  for (int i = 0; i < ALL; i++) {
    double total = 0;
    for (int m = DEGREE - 1; m >= 0; m--) total = total * theta + (m + 1) * DENSE[i][m];
    w[i] = total;
  }
}
#endif

#if DEVICE
// in the text before this one, where they can be inlined
struct Functions {
  static void fun(const Ctx* c, const S* t, const S* y, S* out) { ::fun(c, t, y, out); }
  static void vjp(const Ctx* c, const S* t, const S* y, const S* v, S* ybar, S* tbar) { ::vjp(c, t, y, v, ybar, tbar); }
  static void jac(const Ctx* c, const S* t, const S* y, S* J, S* slope) { ::jac(c, t, y, J, slope); }
  static void mass(const Ctx* c, const S* t, const S* y, S* matrix) { ::mass(c, t, y, matrix); }
  static void mass_vjp(const Ctx* c, const S* t, const S* y, const S* v, S* ybar, S* tbar) { ::mass_vjp(c, t, y, v, ybar, tbar); }
  static void bend(const Ctx* c, const S* t, const S* y, const S* weights, const S* of_slope, S* ybar, S* tbar, S* phi) { ::bend(c, t, y, weights, of_slope, ybar, tbar, phi); }
};
template <class Q> FN Functions functions_of(const Q&) { return {}; }
#else
struct Functions {
  void (*fun)(const Ctx*, const S* t, const S* y, S* out);
  void (*vjp)(const Ctx*, const S* t, const S* y, const S* v, S* ybar, S* tbar);
  // those entries of the Jacobian (n, n) that are not always zero, and the slope in time. Of implicit equations F(t, y, y') = 0 y stands for
  // y and y' side by side, 2 n numbers, and the Jacobian is (n, 2 n)
  void (*jac)(const Ctx*, const S* t, const S* y, S* J, S* slope);
  // the matrix in front of the slopes (n, n), and from its cotangent those of the inputs
  void (*mass)(const Ctx*, const S* t, const S* y, S* matrix);
  void (*mass_vjp)(const Ctx*, const S* t, const S* y, const S* v, S*, S*);
  // of phi = sum weights_ij J_ij + sum of_slope_i slope_i: itself, and its gradient added to ybar and tbar
  void (*bend)(const Ctx*, const S* t, const S* y, const S* weights, const S* of_slope, S* ybar, S* tbar, S* phi);
  // set where factors of a matrix are none, as rows would have to be exchanged; or nothing
  long* lost;
};
// of the state of every lane: the values of all event functions
typedef void (*EventFunctions)(const Ctx*, const S* t, const S* y, S* values);
template <class Q> static Functions functions_of(const Q& q) {
  return {(decltype(Functions::fun))q.fun, (decltype(Functions::vjp))q.vjp, (decltype(Functions::jac))q.jac, (decltype(Functions::mass))q.mass, (decltype(Functions::mass_vjp))q.mass_vjp,
          (decltype(Functions::bend))q.bend, q.lost};
}
#endif

// an attempted step of the trajectories ``on``, from y, where the slope is k1: what it is given, and where its results go
enum { JACOBIANS, FACTORISATIONS, SOLVES, ITERATIONS, EVALUATED, COUNTS };
struct History;
struct Attempt {
  const Functions& f; const Ctx& c; const S* times; S h;
  const S *y, *k1, *rtol, *atol, *step_rtol, *step_atol;  // tolerances of an iteration for stages, and of the step
  S* last_ks; double last_h[W]; bool guesses;  // the step before, and whether iterations may begin with it
  S *ks, *y1, *error, *work, *beside, *left;  // beside, left: of the defect, see constraints.hpp
  const R* power; const unsigned char* skipped;
  History* past;  // of a multistep method
  bool adaptive, on[W], again[W], stuck[W];  // again: from the same place as the attempt before; stuck: the iteration did not converge
  long counts[COUNTS][W];
  void count(int what, long n = 1) { for (int l = 0; l < W; l++) counts[what][l] += on[l] * n; }
};
FN S unit_of(const Attempt& a, const S& size, int n) { return size * a.step_rtol[n] + a.step_atol[n]; }
FN S root_of(const S& total) { return m_sqrt(total) * K(R(ROOT)); }
struct Before;
// a step taken back, from bar, the cotangent of the state at its end, and kbar, those of its stages or nothing: ybar, that of y
struct Return {
  const Functions& f; const Ctx& c; const S* times; S h;
  const S *y, *bar, *kbar;
  S *ks, *ybar, *first, *work;  // first: of a first stage that was handed on by the step before
  bool timed;
  S tbar, hbar;
  const Before* before;
};
#if W == 1
template <class B> FN M mask_of(const B& b) { return b[0]; }
#else
template <class B> FN M mask_of(const B& b) { M r; for (int l = 0; l < W; l++) r[l] = b[l] ? -1 : 0; return r; }
#endif

#if !DEVICE
extern "C" { void* malloc(size_t); void* calloc(size_t, size_t); void free(void*); void* aligned_alloc(size_t, size_t); void* memcpy(void*, const void*, size_t); }
#endif
// memory of so many numbers of every lane: on a device its thread's own
#if DEVICE
template <long COUNT> struct Memory {
  S at[COUNT > 0 ? COUNT : 1];
  operator S*() { return at; }
};
#else
static inline S* lanes_of(long n) { return (S*)aligned_alloc(64, (n * sizeof(S) + 63) / 64 * 64 + 64); }
template <long COUNT> struct Memory {
  S* const at;
  Memory() : at(COUNT > 0 ? lanes_of(COUNT) : nullptr) {}
  Memory(const Memory&) = delete;
  ~Memory() { free(at); }
  operator S*() const { return at; }
};
#endif
constexpr long added(const long* numbers, const long* but_for = nullptr) {
  long total = 0;
  for (int k = 0; k < INPUTS; k++) if (!but_for || !but_for[k]) total += numbers[k];
  return total;
}
// numbers of each trajectory's own inputs, and of cotangents of shared ones
static constexpr int ARGUMENTS_OF_FUN = (1 + IMPLICIT) * N;
static constexpr long OWNED = added(OWN), SHARED = added(NUMBERS, OWN);

// the inputs that each trajectory has for itself, one for every lane
struct Own {
  Memory<W == 1 ? 0 : OWNED> memory; const S* a[INPUTS + 1];
  Own() {
    if (W == 1) return;
    S* at = memory;
    for (long e = 0; e < OWNED; e++) at[e] = K(0);
    for (int k = 0; k < INPUTS; k++) { a[k] = at; at += OWN[k]; }
  }
  void load(const R* const* inputs, int lane, long row) {
    for (int k = 0; k < INPUTS; k++) if (OWN[k]) {
      const R* from = inputs[k] + row * OWN[k];
      if (W == 1) a[k] = (const S*)from;
      else for (long e = 0; e < OWN[k]; e++) put(((S*)a[k])[e], lane, from[e]);
    }
  }
};

// Times of the stages of steps from t of size h, at jumps from within the step. sign: the direction of time
FN R moved(R x, bool on, double toward) { return on ? beside(x, toward) : x; }
static void stage_times(const double* t, const double* h, const double* sign, const bool* jump, const bool* jumps_end, S* times) {
  if (!TIMED) return;
  for (int i = 0; i < TIMES; i++) for (int l = 0; l < W; l++) {
    const R x = (R)(t[l] + h[l] * C[i]);
    put(times[i], l, C[i] == 0 ? moved(x, jump[l], sign[l] * BEYOND_ALL) : C[i] == 1 ? moved(x, jumps_end[l], -sign[l] * BEYOND_ALL) : x);
  }
}

#if !DEVICE
// work in blocks of rows, each done by one thread, whatever their number: sums do not depend on it
struct Crew { long blocks; volatile long next; void (*work)(void*, long); void* with; };
static void* member(void* p) {
  Crew* crew = (Crew*)p;
  for (;;) {
    long b = __atomic_fetch_add(&crew->next, 1, __ATOMIC_RELAXED);
    if (b >= crew->blocks) return nullptr;
    crew->work(crew->with, b);
  }
}
static void one_of_team(void* p) { member(p); }
// team: what runs a function in so many threads that are there already; without one, threads are begun
typedef void (*Team)(void (*)(void*), void*, unsigned, unsigned);
static void together(long threads, void* team, long blocks, void (*work)(void*, long), void* with) {
  Crew crew{blocks, 0, work, with};
  if (threads > blocks) threads = blocks;
  if (threads > 1 && team) return ((Team)team)(one_of_team, &crew, (unsigned)threads, 0);
  pthread_t others[64];
  long started = 0;
  for (long i = 1; i < threads && started < 64; i++) if (!pthread_create(&others[started], nullptr, member, &crew)) started++;
  member(&crew);
  for (long i = 0; i < started; i++) pthread_join(others[i], nullptr);
}
#endif
