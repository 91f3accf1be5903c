// One mathematical function per case; test_cuda_kernels.py has the same order.
extern "C" __global__ void pw(float* o, const float* b, int n, int which) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float x = b[i], r = 0;
  switch (which) {
    case 0:
      r = expf(x);
      break;
    case 1:
      r = tanhf(x);
      break;
    case 2:
      r = sinf(x);
      break;
    case 3:
      r = logf(fabsf(x) + 1e-3f);
      break;
    case 4:
      r = erff(x);
      break;
    case 5:
      r = powf(fabsf(x), 1.7f);
      break;
    case 6:
      r = __expf(x);
      break;
    case 7:
      r = rsqrtf(fabsf(x) + 1e-3f);
      break;
    case 8:
      r = log1pf(x * x);
      break;
    case 9:
      r = floorf(x);
      break;
    case 10:
      r = rintf(x);
      break;
    case 11:
      r = fmodf(x, 3.f);
      break;
    case 12:
      r = cosf(x * 1000.f);
      break;
    case 13:
      r = expm1f(x);
      break;
    case 14:
      r = 1.f / x;
      break;
    case 15:
      r = sqrtf(fabsf(x));
      break;
    case 16:
      r = cbrtf(x);
      break;
    case 17:
      r = roundf(x);
      break;
    case 18:
      r = truncf(x);
      break;
    case 19:
      r = atan2f(x, 2.f);
      break;
    case 20:
      r = ceilf(x);
      break;
    case 21:
      r = sinf(x * 1.0e7f);
      break;
    case 22:
      r = x / 3.0f;
      break;
    case 23:
      r = erfcf(x);
      break;
    case 24:
      r = lgammaf(fabsf(x) + 0.1f);
      break;
    case 25:
      r = log2f(fabsf(x) + .1f);
      break;
    case 26:
      r = exp2f(x);
      break;
    case 27:
      r = asinf(x / 20.f);
      break;
    case 28:
      r = hypotf(x, 3.f);
      break;
    case 29:
      r = nextafterf(x, 100.f);
      break;
  }
  o[i] = r;
}
extern "C" __global__ void pwd(double* o, const double* b, int n, int which) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  double x = b[i], r = 0;
  switch (which) {
    case 0:
      r = exp(x);
      break;
    case 1:
      r = tanh(x);
      break;
    case 2:
      r = sin(x);
      break;
    case 3:
      r = log(fabs(x) + 1e-3);
      break;
    case 4:
      r = erf(x);
      break;
    case 5:
      r = pow(fabs(x), 1.7);
      break;
    case 6:
      r = sqrt(fabs(x));
      break;
    case 7:
      r = rsqrt(fabs(x) + 1e-3);
      break;
    case 8:
      r = 1.0 / x;
      break;
    case 9:
      r = floor(x);
      break;
    case 10:
      r = fmod(x, 3.0);
      break;
    case 11:
      r = cos(x * 1e7);
      break;
    case 12:
      r = x / 3.0;
      break;
    case 13:
      r = rint(x);
      break;
    case 14:
      r = cbrt(x);
      break;
    case 15:
      r = fma(x, x, 1.0);
      break;
  }
  o[i] = r;
}
