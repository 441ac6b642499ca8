"""One state of many rows that know nothing of each other, such as a mini-batch: functions that take it row by row.

To the engine it is one trajectory of ``rows * n`` numbers. What it calls puts W rows side by side into vectors, calls the functions of one
row and puts the results back.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["of_all_rows"]

_TEXT = """
enum {{ ROWS = {rows}, WIDTH = {width}, GROUPS = (ROWS + W - 1) / W }};
static constexpr long OWN_OF_ROW[] = {{{own}}}, SHARED_OF_ALL[] = {{{shared}}};
// rows of group g: those behind the last one are copies of it, whose cotangents are zero
static inline long row_of(long g, int l) {{ const long r = g * W + l; return r < ROWS ? r : ROWS - 1; }}
static inline void gathered(const R* from, long each, long g, S* to) {{
  for (int l = 0; l < W; l++) {{ const R* x = from + row_of(g, l) * each; for (long e = 0; e < each; e++) to[e][l] = x[e]; }}
}}
struct Rows {{
  const R* const* u; S own[{most_own}]; const S* a[{count}]; Ctx c;
  Rows(const Ctx* given, S* const* b) : u(given->u) {{
    S* at = own;
    for (int k = 0; k < {inputs}; k++) {{ a[k] = at; at += OWN_OF_ROW[k]; }}
    c = {{given->u, a, given->k, b}};
  }}
  void load(long g) {{ for (int k = 0; k < {inputs}; k++) if (OWN_OF_ROW[k]) gathered(u[k], OWN_OF_ROW[k], g, (S*)a[k]); }}
}};
extern "C" void fun(const Ctx* c, const R* tp, const R* y, R* o) {{
  Rows rows(c, nullptr);
  const S t = K(*tp);
  S in[WIDTH], out[WIDTH];
  for (long g = 0; g < GROUPS; g++) {{
    rows.load(g);
    gathered(y, WIDTH, g, in);
    fun_of_row(&rows.c, &t, in, out);
    for (int l = 0; l < W && g * W + l < ROWS; l++) for (int n = 0; n < WIDTH; n++) o[(g * W + l) * WIDTH + n] = out[n][l];
  }}
}}
extern "C" void vjp(const Ctx* c, const R* tp, const R* y, const R* v, R* yb, R* tb) {{
  S bars[{most_bars}], *b[{count}], in[WIDTH], bar[WIDTH], out[WIDTH], at = K(R(0));
  S* next = bars;
  for (int k = 0; k < {inputs}; k++) {{ b[k] = next; next += OWN_OF_ROW[k] + SHARED_OF_ALL[k]; }}
  for (S* x = bars; x < next; x++) *x = K(R(0));
  Rows rows(c, b);
  const S t = K(*tp);
  R* const* sums = (R* const*)c->b;
  for (long g = 0; g < GROUPS; g++) {{
    rows.load(g);
    gathered(y, WIDTH, g, in);
    gathered(v, WIDTH, g, bar);
    for (int l = 0; l < W; l++) if (g * W + l >= ROWS) for (int n = 0; n < WIDTH; n++) bar[n][l] = 0;
    vjp_of_row(&rows.c, &t, in, bar, out, &at);
    for (int l = 0; l < W && g * W + l < ROWS; l++) for (int n = 0; n < WIDTH; n++) yb[(g * W + l) * WIDTH + n] = out[n][l];
    for (int k = 0; k < {inputs}; k++) for (long e = 0; e < OWN_OF_ROW[k]; e++) {{
      for (int l = 0; l < W && g * W + l < ROWS; l++) sums[k][(g * W + l) * OWN_OF_ROW[k] + e] += b[k][e][l];
      b[k][e] = K(R(0));
    }}
  }}
  for (int k = 0; k < {inputs}; k++) for (long e = 0; e < SHARED_OF_ALL[k]; e++) {{
    R total = 0;
    for (int l = 0; l < W; l++) total += b[k][e][l];
    sums[k][e] += total;
  }}
  for (int l = 0; l < W; l++) *tb += at[l];
}}
"""


def of_all_rows(texts: dict[str, str], rows: int, width: int, own: Sequence[int], numbers: Sequence[int]) -> str:
    """``fun`` and ``vjp`` of a state of ``rows`` rows of ``width`` numbers, after those of one row.

    ``own``: how many numbers of each input belong to one row, 0 where all share it; ``numbers``: how many cotangents shared ones have.
    """
    of_row = [texts[name].replace(f'EMITTED {name}(', f"static inline void {name}_of_row(", 1) for name in ("fun", "vjp")]
    shared = [0 if mine else n for mine, n in zip(own, numbers, strict=True)]
    wrapped = _TEXT.format(
        rows=rows,
        width=width,
        own=", ".join(map(str, [*own, 0])),
        shared=", ".join(map(str, [*shared, 0])),
        inputs=len(own),
        count=len(own) + 1,
        most_own=max(sum(own), 1),
        most_bars=max(sum(own) + sum(shared), 1),
    )
    return "\n".join([*of_row, wrapped])
