/* The end of what lanes.h, included before, defined; NAME and W were given to it. */

#undef NAME
#undef W
#undef TARGET
#undef V
#undef I
#undef V_LOAD
#undef V_STORE
#undef V_SET1
#undef V_ADD
#undef V_SUB
#undef V_MUL
#undef V_FMA
#undef V_FNMA
#undef V_MIN
#undef V_EQUAL
#undef V_AT_MOST
#undef V_KEEP_LESS
#undef I_SET1
#undef I_STORE
