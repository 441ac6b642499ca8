// Solves and their ways back on a device: a thread for each trajectory, which runs the loop and the sweep of all other solves for that one alone.
#define KERNEL extern "C" __global__ void
#define THREAD ((long)blockIdx.x * blockDim.x + threadIdx.x)

// of a trajectory that has filled a round, for the next one
enum { FILLED = 9 };
struct Saved {
  Standing standing; long counts[COUNTS]; double last_h; bool stuck;
  S memory[Loop::ROOM_BEFORE_STEP];
  void leave(const Loop& loop) {
    standing = loop;
    for (int i = 0; i < COUNTS; i++) counts[i] = loop.a.counts[i][0];
    last_h = loop.a.last_h[0]; stuck = loop.a.stuck[0];
    for (long i = 0; i < Loop::ROOM_BEFORE_STEP; i++) memory[i] = loop.memory.at[i];
  }
  void take(Loop& loop) const {
    (Standing&)loop = standing;
    for (int i = 0; i < COUNTS; i++) loop.a.counts[i][0] = counts[i];
    loop.a.last_h[0] = last_h; loop.a.stuck[0] = stuck;
    for (long i = 0; i < Loop::ROOM_BEFORE_STEP; i++) loop.memory.at[i] = memory[i];
    loop.waiting = loop.to;
  }
};
// bytes that a round leaves of a trajectory for the next one
KERNEL measure(long* bytes) { bytes[0] = sizeof(Saved); }

// a round of count trajectories, those of ``which`` or the first ones; saved: where they are left, or from where they go on
KERNEL solve(const __grid_constant__ Forward q, const long* which, long count, Saved* saved, long round) {
  const long i = THREAD;
  if (i >= count) return;
  const long r = which ? which[i] : i;
  Tape tape;
  Loop loop(q, tape, r, r + 1);
  if (round) saved[r].take(loop);
  loop.run();
  if (loop.live[0]) {
    saved[r].leave(loop);
    q.status[r] = FILLED; q.n_accepted[r] = loop.accepted[0]; q.t_final[r] = loop.t[0];
  }
}
// the ends of rows with fewer steps than others
KERNEL fill_up(const __grid_constant__ Forward q, long steps) {
  if (THREAD < q.rows) pad(q, q, steps, THREAD, THREAD + 1);
}
#if !DISPLACED
// the way back of count trajectories from the one numbered ``from`` on; totals (SHARED, count): what each adds to cotangents of shared inputs
KERNEL sweep(const __grid_constant__ Backward q, long from, long count, R* totals) {
  const long i = THREAD;
  if (i >= count) return;
  S mine[SHARED > 0 ? SHARED : 1];
  for (long e = 0; e < SHARED; e++) mine[e] = 0;
  Back_ back(q, from + i, from + i + 1, mine);
  back.run();
  for (long e = 0; e < SHARED; e++) totals[e * count + i] = mine[e];
}
// of (rows, columns) the sums (rows, groups), each over every groups-th column: always in one order, so that they are the same from run to run
KERNEL add_up(const R* x, R* sums, long rows, long columns, long groups) {
  const long i = THREAD, e = i / groups, g = i % groups;
  if (e >= rows) return;
  R total = 0;
  for (long c = g; c < columns; c += groups) total += x[e * columns + c];
  sums[i] = total;
}
#endif
