// Hand-written: Dormand-Prince 5(4) with error control and its discrete adjoint for two systems, W trajectories at a time.
// g++ -O3 -march=native -ffast-math -shared -fPIC -DW=8 -DSYSTEM=lotka floor.cpp

#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

typedef double V __attribute__((vector_size(W * sizeof(double))));
typedef long long M __attribute__((vector_size(W * sizeof(long long))));

struct lotka {
  static const int N = 2, P = 4;
  static void rate(const V* y, const V* p, V* f) {
    const V met = y[0] * y[1];
    f[0] = p[0] * y[0] - p[1] * met;
    f[1] = p[3] * met - p[2] * y[1];
  }
  static void pull(const V* y, const V* p, const V* v, V* u, V* q) {
    const V met = y[0] * y[1], bar = p[3] * v[1] - p[1] * v[0];
    u[0] = p[0] * v[0] + bar * y[1];
    u[1] = bar * y[0] - p[2] * v[1];
    q[0] += y[0] * v[0]; q[1] -= met * v[0]; q[2] -= y[1] * v[1]; q[3] += met * v[1];
  }
};

struct vdp {
  static const int N = 2, P = 1;
  static void rate(const V* y, const V* p, V* f) {
    f[0] = y[1];
    f[1] = p[0] * (1.0 - y[0] * y[0]) * y[1] - y[0];
  }
  static void pull(const V* y, const V* p, const V* v, V* u, V* q) {
    const V rest = 1.0 - y[0] * y[0];
    u[0] = -(2.0 * p[0] * y[0] * y[1] + 1.0) * v[1];
    u[1] = v[0] + p[0] * rest * v[1];
    q[0] += rest * y[1] * v[1];
  }
};

typedef SYSTEM S;
const int N = S::N, P = S::P, STAGES = 7;
const double A[STAGES][6] = {
    {}, {1. / 5}, {3. / 40, 9. / 40}, {44. / 45, -56. / 15, 32. / 9}, {19372. / 6561, -25360. / 2187, 64448. / 6561, -212. / 729},
    {9017. / 3168, -355. / 33, 46732. / 5247, 49. / 176, -5103. / 18656}, {35. / 384, 0, 500. / 1113, 125. / 192, -2187. / 6784, 11. / 84}};
const double E[STAGES] = {71. / 57600, 0, -71. / 16695, 71. / 1920, -17253. / 339200, 22. / 525, -1. / 40};

struct Step { V h, y[N]; };

static V absolute(V x) { return x < 0 ? -x : x; }

template <int COUNT> static void stages(const Step& s, const V* p, V at[][N], V k[][N]) {
  #pragma GCC unroll 8
  for (int i = 1; i < COUNT; i++) {
    for (int n = 0; n < N; n++) {
      V sum = A[i][0] * k[0][n];
      for (int j = 1; j < i; j++) if (A[i][j]) sum += A[i][j] * k[j][n];
      at[i][n] = s.y[n] + s.h * sum;
    }
    S::rate(at[i], p, k[i]);
  }
}

static V norm(const V* x, const V* size, double rtol, double atol) {
  V sum = {};
  for (int n = 0; n < N; n++) { const V r = x[n] / (atol + rtol * size[n]); sum += r * r; }
  return sum / (double)N;
}

// W trajectories from t = 0; y: the states, in and out; steps: how many attempts each took; bar: of the parameters, or null
static void group(V* y, const V* p, double end, double rtol, double atol, M& steps, V* bar, std::vector<Step>& tape) {
  V at[STAGES][N], k[STAGES][N], size[N], t = {}, f1[N];
  S::rate(y, p, k[0]);
  for (int n = 0; n < N; n++) size[n] = absolute(y[n]);
  // the first step: Hairer, Norsett & Wanner I, section II.4
  V h;
  {
    const V d0 = norm(y, size, rtol, atol), d1 = norm(k[0], size, rtol, atol);
    for (int l = 0; l < W; l++) h[l] = d0[l] < 1e-10 || d1[l] < 1e-10 ? 1e-6 : std::min(end, 0.01 * std::sqrt(d0[l] / d1[l]));
    for (int n = 0; n < N; n++) at[0][n] = y[n] + h * k[0][n];
    S::rate(at[0], p, f1);
    for (int n = 0; n < N; n++) f1[n] -= k[0][n];
    const V d2 = norm(f1, size, rtol, atol);
    for (int l = 0; l < W; l++) {
      const double worst = std::max(std::sqrt(d1[l]), std::sqrt(d2[l]) / h[l]);
      h[l] = std::min(100 * h[l], worst <= 1e-15 ? std::max(1e-6, 1e-3 * h[l]) : std::pow(0.01 / worst, 0.2));
    }
  }
  tape.clear();
  M going = t < end, refused = {};
  while (true) {
    bool any = false;
    for (int l = 0; l < W; l++) any = any || going[l];
    if (!any) break;
    const V left = end - t;
    const M lands = h * 1.01 >= left;
    Step s;
    s.h = going ? (lands ? left : h) : V{};
    for (int n = 0; n < N; n++) s.y[n] = y[n];
    stages<STAGES>(s, p, at, k);
    V error[N];
    for (int n = 0; n < N; n++) {
      V sum = E[0] * k[0][n];
      for (int i = 2; i < STAGES; i++) sum += E[i] * k[i][n];
      error[n] = s.h * sum;
      const V before = absolute(y[n]), after = absolute(at[6][n]);
      size[n] = before > after ? before : after;
    }
    const V e = norm(error, size, rtol, atol);
    const M passed = going & (e <= 1.0);
    V factor;
    for (int l = 0; l < W; l++) factor[l] = std::min(10.0, std::max(0.2, 0.9 * std::pow(std::max(e[l], 1e-20), -0.1)));
    factor = refused && factor > 1.0 ? V{} + 1.0 : factor;
    h = going ? s.h * factor : h;
    refused = going & ~passed;
    steps -= going;
    bool some = false;
    for (int l = 0; l < W; l++) some = some || passed[l];
    if (!some) continue;
    s.h = passed ? s.h : V{};
    for (int n = 0; n < N; n++) {
      y[n] = passed ? at[6][n] : y[n];
      k[0][n] = passed ? k[6][n] : k[0][n];
    }
    t += s.h;
    if (bar) tape.push_back(s);
    going = going & ~(passed & lands);
  }
  if (!bar) return;
  V l1[N], u[6][N], v[N];
  for (int n = 0; n < N; n++) l1[n] = y[n] - 1.0;
  for (int c = 0; c < P; c++) bar[c] = V{};
  for (size_t i = tape.size(); i-- > 0;) {
    const Step& s = tape[i];
    for (int n = 0; n < N; n++) at[0][n] = s.y[n];
    S::rate(at[0], p, k[0]);
    stages<6>(s, p, at, k);
    #pragma GCC unroll 8
    for (int j = 5; j >= 0; j--) {
      for (int n = 0; n < N; n++) {
        V sum = A[6][j] * l1[n];
        for (int m = j + 1; m < 6; m++) sum += A[m][j] * u[m][n];
        v[n] = s.h * sum;
      }
      S::pull(at[j], p, v, u[j], bar);
    }
    for (int n = 0; n < N; n++) for (int j = 0; j < 6; j++) l1[n] += u[j][n];
  }
}

extern "C" void solve(
    const double* y0, const double* p, double* y1, double* bar, long long* steps, long count, double end, double rtol, double atol, int threads) {
  auto work = [=](long first, long last) {
    std::vector<Step> tape;
    for (long b = first; b < last; b += W) {
      V y[N], q[P], g[P];
      M n_steps = {};
      for (int l = 0; l < W; l++) {
        const long row = std::min(b + l, count - 1);
        for (int n = 0; n < N; n++) y[n][l] = y0[row * N + n];
        for (int c = 0; c < P; c++) q[c][l] = p[row * P + c];
      }
      group(y, q, end, rtol, atol, n_steps, bar ? g : nullptr, tape);
      for (int l = 0; l < W && b + l < count; l++) {
        for (int n = 0; n < N; n++) y1[(b + l) * N + n] = y[n][l];
        for (int c = 0; c < P && bar; c++) bar[(b + l) * P + c] = g[c][l];
        steps[b + l] = n_steps[l];
      }
    }
  };
  const long each = (count / W + threads) / threads * W;
  std::vector<std::thread> others;
  for (int k = 1; k < threads; k++) others.emplace_back(work, std::min(k * each, count), std::min((k + 1) * each, count));
  work(0, std::min(each, count));
  for (auto& other : others) other.join();
}
