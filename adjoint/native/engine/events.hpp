// Events: changes of sign of functions over a step, located on its dense output. The rules are those of
// `integrate/events.py`, for one trajectory at a time. Constants: EVENTS, FARTHEST (of the nodes, at least 1), REAL_EPSILON.
struct Found { long id, row, step; double t; struct Noted* noted; };
// the function and whether fun jumps there, and behind them the state and its slope
struct Noted {
  double value; long jumps;
  R* y() { return (R*)(this + 1); }
  static Noted* made() { return (Noted*)malloc(sizeof(Noted) + 2 * N * sizeof(R)); }
};
struct Log {
  Found* found; long n, room; pthread_mutex_t lock;
  void add(const Found& x) {
    pthread_mutex_lock(&lock);
    if (n == room) {
      Found* more = (Found*)malloc((2 * room + 16) * sizeof(Found));
      memcpy(more, found, n * sizeof(Found));
      free(found);
      found = more; room = 2 * room + 16;
    }
    found[n++] = x;
    pthread_mutex_unlock(&lock);
  }
};
FN double sign_of(double x) { return x > 0 ? 1 : x < 0 ? -1 : x; }
static const double NONE = NO_NUMBER, NEVER = BEYOND_ALL, TINY = 1e-300, EPS = 2.220446049250313e-16;

// a root of f between start and end, where it is f0 and f1 of different signs (Chandrupatla 1997)
template <class F> static double chandrupatla(const F& f, double f0, double f1, double start, double end) {
  const double beyond = -sign_of(f0) * TINY, tolerance = 4 * EPS;
  if (f1 == 0) f1 = beyond;
  double a = 1, fa = f1, b = 0, fb = f0, c = b, fc = fb, share = 0.5, best = a;
  for (int k = 0; k < 200; k++) {
    const double x = a + share * (b - a);
    double fx = f(start + x * (end - start));
    if (fx == 0) fx = beyond;  // zero belongs to the far side
    if (sign_of(fx) == sign_of(fa)) { c = a; fc = fa; } else { c = b; fc = fb; b = a; fb = fa; }
    a = x; fa = fx;
    best = BD(fabs)(fa) < BD(fabs)(fb) ? a : b;
    const double least_ = tolerance / BD(fabs)(b - a);
    if (least_ > 0.5 || !finite(fx)) break;
    const double xi = (a - b) / (c - b), phi = (fa - fb) / (fc - fb);
    const double inverse = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb);
    const bool smooth = phi * phi < xi && (1 - phi) * (1 - phi) < 1 - xi && finite(inverse);
    share = least(most(smooth ? inverse : 0.5, least_), 1 - least_);
  }
  return best >= 1 - 2 * tolerance ? end : start + best * (end - start);
}
// towards the minimum of f between two points, begun at x and ended where it is negative: by parabolas
template <class F> static double lowest(const F& f, double& x, double a, double fa, double b, double fb) {
  double v = f(x);
  for (int k = 0; k < 8; k++) {
    if (!(v >= 0 && v <= fa && v <= fb)) break;
    const double p = (x - a) * (x - a) * (v - fb), q = (x - b) * (x - b) * (v - fa);
    const double vertex = x - 0.5 * (p - q) / ((x - a) * (v - fb) - (x - b) * (v - fa));
    const double aside = x + 0.1 * (b - x > x - a ? b - x : a - x);
    const bool usable = finite(vertex) && vertex > a && vertex < b && BD(fabs)(vertex - x) > 1e-3 * (b - a);
    const double at = usable ? vertex : aside, w = f(at);
    const bool better = w < v, below = at < x;
    if (below != better) { a = better ? x : at; fa = better ? v : w; } else { b = better ? x : at; fb = better ? v : w; }
    if (better) { x = at; v = w; }
  }
  return v;
}
// whether a function with these values at 0, 1/3, 2/3 and 1 (and beyond) may change its sign there
static bool may_cross(const double* v, int count) {
  double low = v[0], high = v[0];
  for (int i = 1; i < count; i++) { low = least(low, v[i]); high = most(high, v[i]); }
  if (!(low * high > 0)) return true;
  const double slack = 0.1 * (high - low);
  const double p = -5.0 / 6 * v[0] + 3 * v[1] - 1.5 * v[2] + v[3] / 3, q = v[0] / 3 - 1.5 * v[1] + 3 * v[2] - 5.0 / 6 * v[3];
  return low > 0 ? least(p, q) <= slack : most(p, q) >= -slack;
}

struct Watch {
  double values[EVENTS], margin, hint, last_aim, aim;
  long counts[EVENTS];
  void begin(const Forward& q, long row) { for (int i = 0; i < EVENTS; i++) counts[i] = q.event_counts ? q.event_counts[i * q.rows + row] : 0; margin = 1e-2; hint = last_aim = aim = NONE; }
};
struct Outcome { double stop; bool again; };

// the changes of sign of one function: roots in increasing order. places and values (count): the first four are at 0, 1/3, 2/3 and 1
template <class F> static int crossings(const F& f, const double* places, const double* values, int count, double direction, double* roots) {
  double x[8], v[8];
  int n = 0;
  for (int i = 0; i < count; i++) { x[n] = places[i]; v[n++] = values[i]; }
  // a zero between two values of one sign is no change of it
  for (int i = 1; i < 3; i++) if (values[i] == 0 && values[i - 1] * values[i + 1] > 0) v[i] = sign_of(values[i - 1]) * TINY;
  const double c1 = -5.5 * values[0] + 9 * values[1] - 4.5 * values[2] + values[3], c2 = 9 * values[0] - 22.5 * values[1] + 18 * values[2] - 4.5 * values[3];
  const double c3 = -4.5 * values[0] + 13.5 * values[1] - 13.5 * values[2] + 4.5 * values[3];
  double low = values[0], high = values[0];
  for (int i = 1; i < 4; i++) { low = least(low, values[i]); high = most(high, values[i]); }
  const double root = BD(sqrt)(most(c2 * c2 - 3 * c1 * c3, 0)), q = -(c2 + (c2 < 0 ? -root : root));
  const double extrema[2] = {q / (3 * c3), c1 / q};
  for (int e = 0; e < 2; e++) {
    double at = extrema[e];
    if (!(finite(at) && at > 0 && at < 1 && root > 0)) continue;
    const int k = (int)least(at * 3, 2);
    const double side = sign_of(values[k]), predicted = values[0] + at * (c1 + at * (c2 + at * c3));
    if (!(side != 0 && side == sign_of(values[k + 1]) && side * (2 * c2 + 6 * c3 * at) > 0 && side * predicted <= 0.1 * (high - low))) continue;
    const double w = lowest([&](double s) { return side * f(s); }, at, places[k], side * values[k], places[k + 1], side * values[k + 1]);
    // beyond what rounding may make of values as large as those of this step
    if (!(w < -2.220446049250313e-16 * (high - low))) continue;
    int j = n++;
    for (; j > 0 && x[j - 1] > at; j--) { x[j] = x[j - 1]; v[j] = v[j - 1]; }
    x[j] = at; v[j] = side * w;
  }
  int found = 0;
  for (int k = 0; k + 1 < n; k++) {
    const bool up = v[k] < 0 && v[k + 1] >= 0, down = v[k] > 0 && v[k + 1] <= 0;
    if ((up && direction >= 0) || (down && direction <= 0)) roots[found++] = chandrupatla(f, v[k], v[k + 1], x[k], x[k + 1]);
  }
  return found;
}

// what the changes of sign in a step from t to end mean; value(i, theta): function i along it; aimed: it ends where it was told to
// add(i, t): there is one
template <class F, class A>
static Outcome locate(const F& value, const A& add, Watch& w, const double (*values)[5], const double* places, int count, bool aimed, bool first, double t, double h,
                      double end, bool adaptive, const double* directions, const long* terminal) {
  double theta[EVENTS * 8];
  int kind[EVENTS * 8], n = 0;
  for (int i = 0; i < EVENTS; i++) {
    double roots[8];
    int m = 0;
    if (first && values[i][0] == 0) {
      // where it goes from there: the sign of the first value that is not zero
      double s = 0;
      for (int k = 1; k < 4 && s == 0; k++) s = sign_of(values[i][k]);
      if (s == 0 || s * directions[i] >= 0) roots[m++] = 0;
    }
    m += crossings([&](double x) { return value(i, x); }, places, values[i], count, directions[i], roots + m);
    for (int k = 0; k < m; k++) {
      int j = n++;
      for (; j > 0 && theta[j - 1] > roots[k]; j--) { theta[j] = theta[j - 1]; kind[j] = kind[j - 1]; }
      theta[j] = roots[k]; kind[j] = i;
    }
  }
  long counts[EVENTS];
  for (int i = 0; i < EVENTS; i++) counts[i] = w.counts[i];
  double last = NEVER;
  for (int j = 0; j < n; j++) {
    const int i = kind[j];
    counts[i]++;
    if (terminal[i] > 0 && counts[i] >= terminal[i]) last = least(last, theta[j]);
  }
  // a step once cut short that was still too long is cut more
  const double margin = aimed && last <= 1 ? w.margin * 4 : w.margin, cut = (1 - margin) / FARTHEST, aim = t + last * cut * h;
  const double resolution = 64 * REAL_EPSILON * BD(fabs)(t);
  const bool hopeless = margin > 0.6 || BD(fabs)(aim - t) <= resolution, some = finite(last);
  const bool ending = some && ((aimed && last > 1) || hopeless), again = some && !ending;
  if (again) w.margin = margin;
  const bool far = again && !aimed && 0.125 * BD(fabs)(aim - t) > resolution && adaptive;
  const double share = (1 - 0.125) / FARTHEST;
  const double following = again ? (far ? t + last * share * h : aim) : aimed && !ending ? w.last_aim : NONE;
  if (far) w.last_aim = t + last * (share + (1 - share) * cut) * h;
  else if (aimed || again) w.last_aim = NONE;
  if (following == following) w.aim = following;
  auto time = [&](double x) {
    const double at = x == 1 ? end : t + (finite(x) ? x : 0) * h;
    return BD(fabs)(at - w.hint) <= 8 * EPS * most(BD(fabs)(at), BD(fabs)(h)) ? w.hint : at;
  };
  const double together = 8 * EPS * most(BD(fabs)(t), BD(fabs)(h)) / (h == 0 ? 1 : BD(fabs)(h));
  const double bound = again ? -1 : ending ? last + together : 1;
  for (int j = 0; j < n; j++) if (theta[j] <= bound) {
    w.counts[kind[j]]++;
    add(kind[j], time(theta[j]));
  }
  const Outcome out{ending ? time(last) : NONE, again};
  if (again && last == 1) w.hint = end;
  return out;
}
