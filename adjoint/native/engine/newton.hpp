// The iteration for implicit stages: the rule of `integrate/newton.py`, every lane by itself. It ends at bound, or after so many rounds; it fails where
// changes grow by ``worst``, and if ``early`` as soon as it will not be done in time.
struct Newton {
  bool running[W], failed[W];
  double before[W], rate[W], size[W];
  int round;
  Attempt& a;
  const double bound; const int most; const double worst; const bool early;
  Newton(Attempt& a, double bound, int most) : Newton(a, bound, most, a.on, 2, a.adaptive) {}
  Newton(Attempt& a, double bound, int most, const bool* which, double worst, bool early) : round(0), a(a), bound(bound), most(most), worst(worst), early(early) {
    for (int l = 0; l < W; l++) { running[l] = which[l]; failed[l] = false; before[l] = NOT_A_NUMBER; rate[l] = 1; }
  }
  bool any() const { for (int l = 0; l < W; l++) if (running[l]) return true; return false; }
  // of a change of these lengths: which lanes make it; afterwards running says which go on
  M judge(const S& length) {
    bool moves[W];
    for (int l = 0; l < W; l++) {
      moves[l] = false;
      if (!running[l]) continue;
      const double x = get(length, l);
      const bool fine = finite(x);
      bool bad = !fine;
      if (round) {
        rate[l] = x / before[l];
        bad = bad || rate[l] >= worst;
        if (early) {
          // whether at this rate it will not be done in the rounds that are left
          const double slow = least(rate[l], 1.0), left = most_left();
          bad = bad || rate[l] >= 1 || BD(pow)(slow, left + 1) / ::most(1 - slow, 1e-3) * (x / bound) > 1;
        }
      }
      failed[l] = failed[l] || bad;
      if (bad && fine) a.stuck[l] = true;
      moves[l] = !bad;
      const bool small = round ? rate[l] / ::most(1 - rate[l], 1e-3) * x <= bound && rate[l] < 1 : x <= bound;
      running[l] = !bad && !small && x > 0;
      before[l] = x;
    }
    round++;
    return mask_of(moves);
  }
  double most_left() const { return most - 1 - round; }
  // after the last round: what still runs has failed
  M lost() {
    for (int l = 0; l < W; l++) if (running[l]) { failed[l] = true; a.stuck[l] = true; }
    return mask_of(failed);
  }
};
