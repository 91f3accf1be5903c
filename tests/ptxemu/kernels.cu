// Kernels of many kinds; test_cuda_kernels.py compares what they compute with numpy.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void add(float* c, const float* a, const float* b, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}
extern "C" __global__ void red(float* o, const float* b, int n) {
  __shared__ float s[32];
  float v = 0;
  for (int i = threadIdx.x + blockIdx.x * blockDim.x; i < n; i += blockDim.x * gridDim.x) v += b[i];
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
  if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? s[threadIdx.x] : 0;
    for (int d = 16; d; d >>= 1) v += __shfl_down_sync(~0u, v, d);
    if (!threadIdx.x) atomicAdd(o, v);
  }
}
extern "C" __global__ void mm(float* c, const float* a, const float* b, int M, int N, int K) {
  const int T = 16;
  __shared__ float sa[T][T], sb[T][T + 1];
  int r = blockIdx.y * T + threadIdx.y, q = blockIdx.x * T + threadIdx.x;
  float s = 0;
  for (int k = 0; k < K; k += T) {
    sa[threadIdx.y][threadIdx.x] = r < M && k + threadIdx.x < K ? a[r * K + k + threadIdx.x] : 0.f;
    sb[threadIdx.y][threadIdx.x] =
        q < N && k + threadIdx.y < K ? b[(k + threadIdx.y) * N + q] : 0.f;
    __syncthreads();
    for (int j = 0; j < T; j++) s = fmaf(sa[threadIdx.y][j], sb[j][threadIdx.x], s);
    __syncthreads();
  }
  if (r < M && q < N) c[r * N + q] = s;
}
// mma.sync bf16 with ldmatrix and a 2-stage cp.async pipeline: C[M,N] = A[M,K] B[N,K]^T (or B[K,N]
// with .trans); block = 4 warps, tile 64x32, BK=32
template <bool BT>
__device__ void mma_body(float* c, const __nv_bfloat16* a, const __nv_bfloat16* b, int M, int N,
                         int K) {
  __shared__ __align__(16) __nv_bfloat16 sa[2][64][40];
  __shared__ __align__(16) __nv_bfloat16 sb[2][BT ? 32 : 32][40];
  int t = threadIdx.x, w = t / 32, l = t % 32;
  int m0 = blockIdx.y * 64, n0 = blockIdx.x * 32;
  float acc[4][4] = {};
  auto load = [&](int st, int k) {
    for (int i = t; i < 64 * 4; i += 128) {
      int r = i / 4, q = i % 4;
      unsigned d = __cvta_generic_to_shared(&sa[st][r][q * 8]);
      const void* g = a + (size_t)(m0 + r) * K + k + q * 8;
      int ok = (m0 + r < M && k + q * 8 < K) ? 16 : 0;
      if (!ok) g = a;
      asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(d), "l"(g), "r"(ok));
    }
    for (int i = t; i < 32 * 4; i += 128) {
      int r = i / 4, q = i % 4;
      unsigned d = __cvta_generic_to_shared(&sb[st][r][q * 8]);
      const void* g;
      int ok;
      if (!BT) {
        g = b + (size_t)(n0 + r) * K + k + q * 8;
        ok = (n0 + r < N && k + q * 8 < K) ? 16 : 0;
      } else {
        g = b + (size_t)(k + r) * N + n0 + q * 8;
        ok = (k + r < K && n0 + q * 8 < N) ? 16 : 0;
      }
      if (!ok) g = b;
      asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(d), "l"(g), "r"(ok));
    }
    asm volatile("cp.async.commit_group;");
  };
  int nk = (K + 31) / 32;
  load(0, 0);
  for (int i = 0; i < nk; i++) {
    if (i + 1 < nk) {
      load((i + 1) & 1, (i + 1) * 32);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    int st = i & 1;
    for (int kk = 0; kk < 32; kk += 16) {
      unsigned A[4];
      unsigned ad = __cvta_generic_to_shared(&sa[st][w * 16 + (l % 16)][kk + (l / 16) * 8]);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                   : "=r"(A[0]), "=r"(A[1]), "=r"(A[2]), "=r"(A[3])
                   : "r"(ad));
      for (int j = 0; j < 4; j++) {
        unsigned B[2];
        if (!BT) {
          unsigned bd = __cvta_generic_to_shared(&sb[st][j * 8 + (l % 8)][kk + ((l / 8) & 1) * 8]);
          asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];"
                       : "=r"(B[0]), "=r"(B[1])
                       : "r"(bd));
        } else {
          unsigned bd = __cvta_generic_to_shared(&sb[st][kk + (l % 16)][j * 8]);
          asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1},[%2];"
                       : "=r"(B[0]), "=r"(B[1])
                       : "r"(bd));
        }
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])
            : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[0]), "r"(B[1]));
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < 4; j++)
    for (int q = 0; q < 4; q++) {
      int r = m0 + w * 16 + l / 4 + 8 * (q / 2), n = n0 + j * 8 + 2 * (l % 4) + (q & 1);
      if (r < M && n < N) c[(size_t)r * N + n] = acc[j][q];
    }
}
extern "C" __global__ void mma_nt(float* c, const __nv_bfloat16* a, const __nv_bfloat16* b, int M,
                                  int N, int K) {
  mma_body<false>(c, a, b, M, N, K);
}
extern "C" __global__ void mma_nn(float* c, const __nv_bfloat16* a, const __nv_bfloat16* b, int M,
                                  int N, int K) {
  mma_body<true>(c, a, b, M, N, K);
}
// direct fragments from global memory by the documented layouts: k8 tf32, k8 f16, k16 s8
extern "C" __global__ void mma_misc(float* c, const float* a, const float* b, __half* hc,
                                    const __half* ha, const __half* hb, int* ic,
                                    const signed char* ia, const signed char* ib) {
  int l = threadIdx.x, g = l / 4, t = l % 4;
  {
    unsigned A[4] = {__float_as_uint(a[g * 8 + t]), __float_as_uint(a[(g + 8) * 8 + t]),
                     __float_as_uint(a[g * 8 + t + 4]), __float_as_uint(a[(g + 8) * 8 + t + 4])},
             B[2] = {__float_as_uint(b[t * 8 + g]), __float_as_uint(b[(t + 4) * 8 + g])};
    float C[4] = {0, 0, 0, 0};
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(C[0]), "+f"(C[1]), "+f"(C[2]), "+f"(C[3])
        : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[0]), "r"(B[1]));
    c[g * 8 + 2 * t] = C[0];
    c[g * 8 + 2 * t + 1] = C[1];
    c[(g + 8) * 8 + 2 * t] = C[2];
    c[(g + 8) * 8 + 2 * t + 1] = C[3];
  }
  {
    unsigned A[2] = {*(unsigned*)&ha[g * 8 + 2 * t], *(unsigned*)&ha[(g + 8) * 8 + 2 * t]};
    __half2 bb = __halves2half2(hb[(2 * t) * 8 + g], hb[(2 * t + 1) * 8 + g]);
    unsigned B = *(unsigned*)&bb, C[2] = {0, 0};
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1},{%2,%3},{%4},{%0,%1};"
                 : "+r"(C[0]), "+r"(C[1])
                 : "r"(A[0]), "r"(A[1]), "r"(B));
    *(unsigned*)&hc[g * 8 + 2 * t] = C[0];
    *(unsigned*)&hc[(g + 8) * 8 + 2 * t] = C[1];
  }
  {
    unsigned A[2] = {*(unsigned*)&ia[g * 16 + 4 * t], *(unsigned*)&ia[(g + 8) * 16 + 4 * t]};
    unsigned B = 0;
    for (int j = 0; j < 4; j++) B |= (unsigned)(unsigned char)ib[(4 * t + j) * 8 + g] << (8 * j);
    int C[4] = {0, 0, 0, 0};
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+r"(C[0]), "+r"(C[1]), "+r"(C[2]), "+r"(C[3])
        : "r"(A[0]), "r"(A[1]), "r"(B));
    ic[g * 8 + 2 * t] = C[0];
    ic[g * 8 + 2 * t + 1] = C[1];
    ic[(g + 8) * 8 + 2 * t] = C[2];
    ic[(g + 8) * 8 + 2 * t + 1] = C[3];
  }
}
extern "C" __global__ void atomics(int* i, float* f, double* d, unsigned long long* u, __half2* h,
                                   __nv_bfloat16* bf, int n) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= n) return;
  atomicAdd(i, t);
  atomicMax(i + 1, t);
  atomicMin(i + 2, -t);
  atomicOr(i + 3, 1 << (t & 31));
  atomicXor(i + 4, t);
  atomicInc((unsigned*)i + 5, 6);
  atomicAnd(i + 6, ~(1 << (t & 7)));
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25 * t);
  atomicAdd(u, (unsigned long long)t << 30);
  atomicMax(u + 1, (unsigned long long)t << 33);
  atomicAdd(h, __floats2half2_rn(1.f, 2.f));
  atomicAdd(bf, __float2bfloat16(1.f));
  int old = i[7], as;
  do {
    as = old;
    old = atomicCAS(i + 7, as, as + 3);
  } while (old != as);
  __shared__ int s[8];
  if (threadIdx.x < 8) s[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&s[t & 7], 1);
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(i + 8 + threadIdx.x, s[threadIdx.x]);
}
extern "C" __global__ void collatz(int* o, const int* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int v = x[i], c = 0;
  while (v != 1) {
    if (v & 1) {
      v = 3 * v + 1;
      c++;
      continue;
    }
    v >>= 1;
    c++;
    if (c > 10000) break;
  }
  o[i] = c;
  unsigned m = __activemask();
  o[i + n] = __popc(m);
}
extern "C" __global__ void nested(int* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int s = 0;
  for (int a = 0; a < (i % 7); a++) {
    for (int b = 0; b < (i % 5); b++) {
      if ((a + b) % 3 == 0) continue;
      if (a * b > 10) goto out;
      s += a * b + 1;
    }
    s += 100;
  }
out:
  o[i] = s;
}
extern "C" __global__ void sw(int* o, const int* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int v = x[i];
  switch (v) {
    case 0:
      v = n * 7;
      break;
    case 1:
      v = n * n;
      break;
    case 2:
      v = __popc(n) + 100;
      break;
    case 3:
      v = __brev(n) ^ 3;
      break;
    case 4:
      v = n / (i + 1);
      break;
    case 5:
      v = n % (i + 1);
      break;
    case 6:
      v = __ffs(n);
      break;
    case 7:
      v = __byte_perm(i, n, 0x3210);
      break;
    case 8:
      v = -n;
      break;
    case 9:
      v = __clz(i + 1);
      break;
    case 10:
      v = __funnelshift_l(i, n, 5);
      break;
    default:
      v = 12345;
  }
  o[i] = v;
}
extern "C" __global__ void i64(long long* q, unsigned long long* u, const long long* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long a = x[i], b = x[n - 1 - i];
  long long r = 0;
  r ^= a / (b | 1);
  r += a % (b | 1);
  r ^= __mul64hi(a, b);
  r += a >> (i & 63);
  r ^= (unsigned long long)b >> (i & 63);
  q[i] = r;
  unsigned __int128 t = (unsigned long long)a;
  t = t * (unsigned long long)b + (unsigned long long)i;
  u[i] = (unsigned long long)(t >> 64) ^ (unsigned long long)t;
}
struct P {
  float x[8];
  int n;
  const float* p;
};
__device__ __noinline__ float nf(float x, const P* p, int k) {
  float s = 0;
  for (int i = 0; i < p->n; i++) s += p->x[(i + k) & 7] * x;
  if (k > 3) return s + 1.f;
  return s;
}
__constant__ float tab[16];
__device__ int gctr;
extern "C" __global__ void structs(P p, float* o, int k) {
  float l[32];
  for (int i = 0; i < 32; i++) l[(i * k) & 31] = i * 0.5f;
  P q = p;
  q.x[k & 7] += 1.f;
  float v = o[threadIdx.x];
  o[threadIdx.x] =
      nf(v, &q, k) + l[threadIdx.x & 31] + p.x[k & 7] + tab[threadIdx.x & 15] + p.p[threadIdx.x];
  atomicAdd(&gctr, 1);
  extern __shared__ float dyn[];
  dyn[threadIdx.x] = o[threadIdx.x];
  __syncwarp();
  o[threadIdx.x] += dyn[threadIdx.x ^ 1];
  if (threadIdx.x == 3 && k == 77) printf("hello %d %.2f %s\n", k, v, "str");
}
extern "C" __global__ void halves(__half* a, __nv_bfloat16* b, __half2* c, __nv_bfloat162* d,
                                  const float* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float f = x[i];
  __half h = __float2half(f);
  __nv_bfloat16 g = __float2bfloat16(f);
  a[i] = h * h + h;
  b[i] = g * g + g;
  c[i] = __hfma2(__floats2half2_rn(f, -f), __floats2half2_rn(2.f, 3.f), __floats2half2_rn(1.f, f));
  d[i] = __hmax2(__floats2bfloat162_rn(f, -f), __floats2bfloat162_rn(0.25f, 0.5f));
  if (__hgt(h, __float2half(1.f))) a[i] = hexp(h);
}
extern "C" __global__ void votes(unsigned* o, const int* x) {
  int t = threadIdx.x;
  int v = x[t];
  unsigned r = __ballot_sync(~0u, v > 3);
  r += __reduce_add_sync(~0u, v) * 3;
  r ^= __match_any_sync(~0u, v);
  r += __any_sync(~0u, v > 5) * 17 + __all_sync(~0u, v >= 0) * 29;
  o[t] = r;
  int c = __syncthreads_count(v > 1);
  int d = __syncthreads_or(v == 7);
  int e = __syncthreads_and(v < 9);
  o[t + blockDim.x] = c * 100 + (d != 0) * 10 + (e != 0);
  if (t % 2) {
    unsigned m = __match_any_sync(0xaaaaaaaau, v);
    o[t + 2 * blockDim.x] = __reduce_max_sync(m, (unsigned)t);
  } else
    o[t + 2 * blockDim.x] = __shfl_sync(0x55555555u, v, (t % 32) & ~3, 32);
}
// How lanes fall on sectors and banks: a stride in global memory, one in shared memory, 16 bytes each.
extern "C" __global__ void strided(float* o, const float* x, int s) {
  o[threadIdx.x] = x[threadIdx.x * s];
}
extern "C" __global__ void strided_shared(float* o, int s) {
  extern __shared__ float a[];
  a[threadIdx.x * s] = threadIdx.x;
  __syncthreads();
  o[threadIdx.x] = a[threadIdx.x * s];
}
extern "C" __global__ void vectors(float4* o, const float4* x) { o[threadIdx.x] = x[threadIdx.x]; }
// Blocks that wait for each other: ends only if all of them are resident.
extern "C" __global__ void grid_sync(int* c, int* x, int* o) {
  x[blockIdx.x] = blockIdx.x + 1;
  __threadfence();
  atomicAdd(c, 1);
  while (atomicAdd(c, 0) < gridDim.x);
  o[blockIdx.x] = ((volatile int*)x)[(blockIdx.x + 1) % gridDim.x];
}
