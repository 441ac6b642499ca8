// What multistep methods look up by the order of every lane.
#if W == 1
FN J whole(const long* x) { return x[0]; }
#else
FN J whole(const long* x) { J r; for (int l = 0; l < W; l++) r[l] = E(x[l]); return r; }
#endif
FN DV doubles(const double* x) { Doubles r; for (int l = 0; l < W; l++) r[l] = x[l]; return r.v; }
FN S looked_up(const double* table, const long* at) { S r = K(0); for (int l = 0; l < W; l++) put(r, l, (R)table[at[l]]); return r; }
FN M equal_to(const J& x, long y) { return (M)(x == KI(y)); }
FN M no_less(const J& x, long y) { return (M)(x >= KI(y)); }
