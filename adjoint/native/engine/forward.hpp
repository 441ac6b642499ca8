// A whole solve, in blocks of rows, and what was found in it.
struct Whole { const Forward* q; Tape* tape; };
static void block_forward(void* p, long b) {
  Whole& w = *(Whole*)p;
  const long from = b * w.q->block, to = least(from + w.q->block, w.q->rows);
  Loop loop(*w.q, *w.tape, from, to);
  loop.run();
}
extern "C" void* forward(const Forward* q) {
  Tape* tape = (Tape*)calloc(1, sizeof(Tape));
  pthread_mutex_init(&tape->lock, nullptr);
#if EVENTS > 0
  pthread_mutex_init(&tape->log.lock, nullptr);
#endif
  Whole w{q, tape};
  together(q->threads, q->team, (q->rows + q->block - 1) / q->block, block_forward, &w);
  return tape;
}
#if EVENTS > 0
extern "C" long count_events(void* p) { return ((Tape*)p)->log.n; }
extern "C" void take_events(void* p, long* id, long* row, long* step, double* t) {
  Log& log = ((Tape*)p)->log;
  for (long i = 0; i < log.n; i++) { id[i] = log.found[i].id; row[i] = log.found[i].row; step[i] = log.found[i].step; t[i] = log.found[i].t; }
  free(log.found);
}
#endif
