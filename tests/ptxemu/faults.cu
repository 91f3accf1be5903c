// Kernels with one fault each, and their twins without it; see test_faults.py.
#include <assert.h>

extern "C" __global__ void oob_r(float* o, const float* x, int n) {
  int i = threadIdx.x;
  o[i] = x[i + n];
}
extern "C" __global__ void oob_w(float* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) o[i] = 1.f;
}
extern "C" __global__ void oob_neg(float* o, const float* x) {
  int i = threadIdx.x;
  o[i] = x[(long long)i - 1];
}
extern "C" __global__ void nullp(float* o, const float* x) {
  if (x[0] > 0.f) o[0] = 1.f;
}
extern "C" __global__ void ovf(float* o, const float* x, int big) {
  int i = threadIdx.x;
  int k = big * big + i;
  o[i] = x[k];
}
extern "C" __global__ void misal(float4* o, const float* x, int s) {
  o[threadIdx.x] = *(const float4*)(x + 4 * threadIdx.x + s);
}
extern "C" __global__ void misal_sh(float* o, int s) {
  __shared__ __align__(16) float a[140];
  a[threadIdx.x] = 1.f;
  a[threadIdx.x + 32] = 1.f;
  a[threadIdx.x + 64] = 1.f;
  a[threadIdx.x + 96] = 1.f;
  a[threadIdx.x + 108] = 1.f;
  __syncthreads();
  float4 v = ((float4*)(a + s))[threadIdx.x];
  o[threadIdx.x] = v.x + v.y * v.z - v.w;
}
extern "C" __global__ void sh_oob(float* o, int s) {
  __shared__ float a[64];
  a[threadIdx.x + s] = 1.f;
  __syncthreads();
  o[threadIdx.x] = a[threadIdx.x];
}
extern "C" __global__ void dyn_oob(float* o) {
  extern __shared__ float d[];
  d[threadIdx.x] = 1.f;
  __syncthreads();
  o[threadIdx.x] = d[threadIdx.x ^ 1];
}
extern "C" __global__ void uninit(float* o) {
  __shared__ float a[128];
  if (threadIdx.x < 100) a[threadIdx.x] = 1.f;
  __syncthreads();
  o[threadIdx.x] = a[threadIdx.x];
}
extern "C" __global__ void uninit2(float* o, int b) {
  __shared__ float a[128];
  if (blockIdx.x == 0) a[threadIdx.x] = 1.f;
  __syncthreads();
  o[threadIdx.x] = a[threadIdx.x];
}
extern "C" __global__ void race_wr(float* o, const float* x) {
  __shared__ float a[128];
  a[threadIdx.x] = x[threadIdx.x];
  o[threadIdx.x] = a[127 - threadIdx.x];
}
extern "C" __global__ void race_rw(float* o, const float* x, int n) {
  __shared__ float a[128];
  for (int k = 0; k < n; k++) {
    a[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    o[threadIdx.x] += a[127 - threadIdx.x];
  }
}
extern "C" __global__ void race_ww(float* o) {
  __shared__ float a[32];
  a[threadIdx.x % 32] = threadIdx.x;
  __syncthreads();
  o[threadIdx.x] = a[threadIdx.x % 32];
}
extern "C" __global__ void race_named(float* o) {
  __shared__ float a[128];
  a[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < 64)
    asm volatile("bar.sync 1, 64;" ::: "memory");
  else
    asm volatile("bar.sync 2, 64;" ::: "memory");
  o[threadIdx.x] = a[threadIdx.x ^ 64];
}
extern "C" __global__ void ok_named(float* o) {
  __shared__ float a[128];
  a[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < 64)
    asm volatile("bar.sync 1, 64;" ::: "memory");
  else
    asm volatile("bar.sync 2, 64;" ::: "memory");
  o[threadIdx.x] = a[threadIdx.x ^ 32];
}
extern "C" __global__ void pc_ok(float* o, int n) {
  __shared__ float a[32];
  int w = threadIdx.x / 32, l = threadIdx.x % 32;
  for (int k = 0; k < n; k++) {
    if (w == 0) {
      if (k) asm volatile("bar.sync 2, 64;" ::: "memory");
      a[l] = k + l;
      asm volatile("bar.arrive 1, 64;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      o[l] += a[31 - l];
      if (k + 1 < n) asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
}
extern "C" __global__ void pc_bad(float* o, int n) {
  __shared__ float a[32];
  int w = threadIdx.x / 32, l = threadIdx.x % 32;
  for (int k = 0; k < n; k++) {
    if (w == 0) {
      asm volatile("bar.arrive 1, 64;" ::: "memory");
      a[l] = k + l;
    } else {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      o[l] += a[31 - l];
    }
  }
}
extern "C" __global__ void ok_half(unsigned short* o) {
  __shared__ unsigned short a[256];
  int t = threadIdx.x;
  a[(t % 32) * 2 + (t / 32)] = t;
  __syncthreads();
  o[t] = a[t ^ 1];
}
extern "C" __global__ void ok_warp(float* o) {
  __shared__ float a[128];
  a[threadIdx.x] = threadIdx.x;
  o[threadIdx.x] = a[threadIdx.x ^ 1];
}
extern "C" __global__ void cp_nowait(float* o, const float* x) {
  __shared__ __align__(16) float a[128];
  unsigned d = __cvta_generic_to_shared(a + threadIdx.x * 4);
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(d), "l"(x + threadIdx.x * 4));
  asm volatile("cp.async.commit_group;");
  __syncthreads();
  for (int j = 0; j < 4; j++) o[threadIdx.x * 4 + j] = a[threadIdx.x * 4 + j];
}
extern "C" __global__ void cp_nobar(float* o, const float* x) {
  __shared__ __align__(16) float a[256];
  unsigned d = __cvta_generic_to_shared(a + threadIdx.x * 4);
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(d), "l"(x + threadIdx.x * 4));
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  for (int j = 0; j < 4; j++) o[threadIdx.x * 4 + j] = a[(threadIdx.x ^ 32) * 4 + j];
}
extern "C" __global__ void cp_overwrite(float* o, const float* x, int n) {
  __shared__ __align__(16) float a[256];
  for (int k = 0; k < n; k++) {
    unsigned d = __cvta_generic_to_shared(a + threadIdx.x * 4);
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(d), "l"(x + threadIdx.x * 4));
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    for (int j = 0; j < 4; j++) o[threadIdx.x * 4 + j] += a[(threadIdx.x ^ 32) * 4 + j];
  }
}
extern "C" __global__ void cp_oob(float* o, const float* x) {
  __shared__ __align__(16) float a[128];
  unsigned d = __cvta_generic_to_shared(a + threadIdx.x * 4);
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(d), "l"(x + threadIdx.x * 4));
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  o[threadIdx.x] = a[threadIdx.x];
}
extern "C" __global__ void gww(float* o) { o[0] = threadIdx.x + blockIdx.x; }
extern "C" __global__ void gww_same(float* o) { o[0] = 3.f; }
extern "C" __global__ void gww_ok(float* o) {
  if (threadIdx.x == 0) o[blockIdx.x] = 1.f;
  __syncthreads();
  if (threadIdx.x == 40) o[blockIdx.x] = 2.f;
}
extern "C" __global__ void divbar(float* o) {
  if (threadIdx.x < 16) {
    __syncthreads();
    o[threadIdx.x] = 1;
  } else {
    o[threadIdx.x] = 2;
    __syncthreads();
    o[threadIdx.x] += 1;
  }
}
extern "C" __global__ void missbar(float* o) {
  if (threadIdx.x < 64) asm volatile("bar.sync 1, 128;" ::: "memory");
  o[threadIdx.x] = 1;
}
extern "C" __global__ void badshfl(float* o) {
  float v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_sync(0xffff0000u, v, 0);
  o[threadIdx.x] = v;
}
extern "C" __global__ void inf(int* o) {
  while (((volatile int*)o)[0] == 0);
  o[1] = 1;
}
extern "C" __global__ void locun(float* o, int k) {
  float l[16];
  for (int i = 0; i < 8; i++) l[(i * k) & 15] = i;
  o[threadIdx.x] = l[threadIdx.x & 15];
}
extern "C" __global__ void readun(float* o, float* tmp, int n) {
  int i = threadIdx.x;
  if (i < n) tmp[i] = i;
  __syncthreads();
  o[i] = tmp[i];
}
extern "C" __global__ void asrt(int* o, int n) {
  assert(o[threadIdx.x] < n);
  o[threadIdx.x] = 1;
}
extern "C" __global__ void trapk(int* o) {
  if (o[0] == 5) __trap();
  o[0] = 1;
}
extern "C" __global__ void wmask(float* o, const float* x) { o[threadIdx.x] = x[threadIdx.x]; }
extern "C" __global__ void halo(float* x) {
  int i = blockIdx.x * 32 + threadIdx.x;
  float l = i ? x[i - 1] : 0.f;
  __syncwarp();
  x[i] = l + x[i];
}
extern "C" __global__ void through_table(float** p, int n) {
  for (int k = 0; k < n; k++)
    if (p[k]) p[k][threadIdx.x] = k;
}
