// Handlers of mma.sync, the products of the tensor cores.
#pragma once
#include "warp.h"

// ---------------------------------------------------------------- mma.sync
// sub: input kind 0 f16 1 bf16 2 tf32 3 f64 4 s8/u8 ; sz = k ; sub2: bit0 c is f16, bit1 d is f16;
// flags bit0 A signed bit1 B signed bit2 satfinite
static inline float tf(u32 x) { return bitsf(x & 0xffffe000u); }
static void h_mma(Exec& X, Warp& W, const Insn& I, u32 m) {
  const u32* ex = &X.K->ext[I.x];
  int k = I.sz;
  int nd = I.vn, na = I.dw, nb = I.aw, nc = I.sgn;
  const u32 *xd = ex, *xa = ex + nd, *xb = xa + na, *xc = xb + nb;
  if (I.sub == 3) {  // f64: m8n8k4 or m16n8k{4,8,16}
    int M = I.eff;
    static thread_local double A[16][16], Bm[16][8], C[16][8];
    for (int l = 0; l < 32; l++) {
      int g = l / 4, t = l % 4;
      if (M == 8) {
        A[g][t] = ((double*)(W.r + xa[0]))[l];
        Bm[t][g] = ((double*)(W.r + xb[0]))[l];
        for (int i = 0; i < 2; i++) C[g][2 * t + i] = ((double*)(W.r + xc[i]))[l];
      } else {
        for (int i = 0; i < na; i++)
          A[g + 8 * (i & 1)][t + 4 * (i >> 1)] = ((double*)(W.r + xa[i]))[l];
        for (int i = 0; i < nb; i++) Bm[t + 4 * i][g] = ((double*)(W.r + xb[i]))[l];
        for (int i = 0; i < 4; i++)
          C[g + 8 * (i >> 1)][2 * t + (i & 1)] = ((double*)(W.r + xc[i]))[l];
      }
    }
    for (int r = 0; r < M; r++)
      for (int p = 0; p < k; p++)
        for (int c = 0; c < 8; c++) C[r][c] = __builtin_fma(A[r][p], Bm[p][c], C[r][c]);
    for (int l = 0; l < 32; l++) {
      int g = l / 4, t = l % 4;
      if (M == 8)
        for (int i = 0; i < 2; i++) ((double*)(W.r + xd[i]))[l] = C[g][2 * t + i];
      else
        for (int i = 0; i < 4; i++)
          ((double*)(W.r + xd[i]))[l] = C[g + 8 * (i >> 1)][2 * t + (i & 1)];
    }
    return;
  }
  if (I.sub == 4) {
    static thread_local s32 A[16][32], Bm[32][8];
    s64 C[16][8];
    for (int l = 0; l < 32; l++) {
      int g = l / 4, t = l % 4;
      for (int r = 0; r < na; r++) {
        u32 v = ((u32*)(W.r + xa[r]))[l];
        for (int j = 0; j < 4; j++) {
          u8 b = v >> 8 * j;
          A[g + 8 * (r & 1)][4 * t + j + 16 * (r >> 1)] = (I.flags & 1) ? (s8)b : b;
        }
      }
      for (int r = 0; r < nb; r++) {
        u32 v = ((u32*)(W.r + xb[r]))[l];
        for (int j = 0; j < 4; j++) {
          u8 b = v >> 8 * j;
          Bm[4 * t + j + 16 * r][g] = (I.flags & 2) ? (s8)b : b;
        }
      }
      for (int i = 0; i < 4; i++) C[g + 8 * (i >> 1)][2 * t + (i & 1)] = ((s32*)(W.r + xc[i]))[l];
    }
    for (int r = 0; r < 16; r++)
      for (int p = 0; p < k; p++)
        for (int c = 0; c < 8; c++) C[r][c] += A[r][p] * Bm[p][c];
    for (int l = 0; l < 32; l++) {
      int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; i++) {
        s64 v = C[g + 8 * (i >> 1)][2 * t + (i & 1)];
        if (I.flags & 4) v = v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : v;
        ((s32*)(W.r + xd[i]))[l] = (s32)(u32)(u64)v;
      }
    }
    return;
  }
  alignas(64) float A[16][16];
  alignas(64) float Bm[16][8];
  alignas(64) float C[16][8];
  if (I.sub == 2) {  // tf32 k4 / k8
    for (int r = 0; r < na; r++) {
      const u32* s = (const u32*)(W.r + xa[r]);
      for (int l = 0; l < 32; l++) A[l / 4 + 8 * (r & 1)][l % 4 + 4 * (r >> 1)] = tf(s[l]);
    }
    for (int r = 0; r < nb; r++) {
      const u32* s = (const u32*)(W.r + xb[r]);
      for (int l = 0; l < 32; l++) Bm[l % 4 + 4 * r][l / 4] = tf(s[l]);
    }
  } else {
    bool bf = I.sub == 1;
    for (int r = 0; r < na; r++) {
      const u32* s = (const u32*)(W.r + xa[r]);
      alignas(64) float lo[32], hi[32];
      if (bf)
        for (int l = 0; l < 32; l++) {
          lo[l] = bitsf(s[l] << 16);
          hi[l] = bitsf(s[l] & 0xffff0000u);
        }
      else
        for (int l = 0; l < 32; l++) {
          lo[l] = h2f((u16)s[l]);
          hi[l] = h2f((u16)(s[l] >> 16));
        }
      int ro = 8 * (r & 1), co = 8 * (r >> 1);
      for (int l = 0; l < 32; l++) {
        A[l / 4 + ro][2 * (l % 4) + co] = lo[l];
        A[l / 4 + ro][2 * (l % 4) + co + 1] = hi[l];
      }
    }
    for (int r = 0; r < nb; r++) {
      const u32* s = (const u32*)(W.r + xb[r]);
      for (int l = 0; l < 32; l++) {
        float lo, hi;
        if (bf) {
          lo = bitsf(s[l] << 16);
          hi = bitsf(s[l] & 0xffff0000u);
        } else {
          lo = h2f((u16)s[l]);
          hi = h2f((u16)(s[l] >> 16));
        }
        Bm[2 * (l % 4) + 8 * r][l / 4] = lo;
        Bm[2 * (l % 4) + 8 * r + 1][l / 4] = hi;
      }
    }
  }
  if (I.sub2 & 1)
    for (int r = 0; r < 2; r++) {
      const u32* s = (const u32*)(W.r + xc[r]);
      for (int l = 0; l < 32; l++) {
        C[l / 4 + 8 * r][2 * (l % 4)] = h2f((u16)s[l]);
        C[l / 4 + 8 * r][2 * (l % 4) + 1] = h2f((u16)(s[l] >> 16));
      }
    }
  else
    for (int i = 0; i < 4; i++) {
      const float* s = (const float*)(W.r + xc[i]);
      for (int l = 0; l < 32; l++) C[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)] = s[l];
    }
  for (int r = 0; r < 16; r++) {
    __m256 acc = _mm256_load_ps(C[r]);
    for (int p = 0; p < k; p++)
      acc = _mm256_fmadd_ps(_mm256_set1_ps(A[r][p]), _mm256_load_ps(Bm[p]), acc);
    _mm256_store_ps(C[r], acc);
  }
  if (I.sub2 & 2)
    for (int r = 0; r < 2; r++) {
      u32* d = (u32*)(W.r + xd[r]);
      for (int l = 0; l < 32; l++)
        d[l] = f2h_rn(C[l / 4 + 8 * r][2 * (l % 4)]) |
               ((u32)f2h_rn(C[l / 4 + 8 * r][2 * (l % 4) + 1]) << 16);
    }
  else
    for (int i = 0; i < 4; i++) {
      float* d = (float*)(W.r + xd[i]);
      for (int l = 0; l < 32; l++) d[l] = C[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)];
    }
}
