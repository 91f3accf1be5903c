// Vectors of one register, in the compiler's own vector extension: the same source serves every
// width. Included once per instruction set, inside that set's namespace.

#ifndef SALKERNELS_ISA  // read by itself: see there
#include "editor-inl.h"
#endif

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(SALKERNELS_VECTOR_BYTES)));
  typedef int32_t index;
  typedef int32_t index_type __attribute__((vector_size(SALKERNELS_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(SALKERNELS_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(SALKERNELS_VECTOR_BYTES)));
  typedef int64_t index;
  typedef int64_t index_type __attribute__((vector_size(SALKERNELS_VECTOR_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(SALKERNELS_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using IndexVec = typename VecOf<T>::index_type;
template <class T>
using Index = typename VecOf<T>::index;  // as wide as T, so that one mask selects both

template <class T>
constexpr int kLanes = SALKERNELS_VECTOR_BYTES / int(sizeof(T));

typedef uint16_t HalfBits __attribute__((vector_size(SALKERNELS_VECTOR_BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Before a loop of few turns over an array of registers, which would else lie in memory.
#ifdef __clang__
#define SALKERNELS_UNROLL _Pragma("unroll")
#else
#define SALKERNELS_UNROLL _Pragma("GCC unroll 16")
#endif

template <class T>
static inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
static inline void store(T* p, const Vec<T>& v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
static inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // unlike a sum with 0 this is x itself to the compiler
}

// Writes around the caches, to an aligned address: a line that is written whole need not be read
// first. `stream_end` comes before another thread may read it.
template <class V>
static inline void stream(void* p, const V& v) {
  static_assert(sizeof(V) == SALKERNELS_VECTOR_BYTES, "a whole register");
#if SALKERNELS_VECTOR_BYTES == 64
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif SALKERNELS_VECTOR_BYTES == 32
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128((__m128i*)p, (__m128i)v);
#else
  __builtin_memcpy(p, &v, sizeof v);
#endif
}
static inline void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

constexpr int64_t kLineBytes = 64;  // of the cache

// Copies around the caches where whole lines are written. Lines in part are written as usual: alone
// they would have to be read by the memory itself.
static inline void stream_copy(char* to, const char* from, int64_t bytes) {
  const int64_t head = least(bytes, int64_t(-reinterpret_cast<uintptr_t>(to) & (kLineBytes - 1)));
  __builtin_memcpy(to, from, size_t(head));
  int64_t done = head;
  for (; done + kLineBytes <= bytes; done += kLineBytes) {
    for (int64_t i = done; i < done + kLineBytes; i += SALKERNELS_VECTOR_BYTES) {
      Vec<float> v;
      __builtin_memcpy(&v, from + i, sizeof v);
      stream(to + i, v);
    }
  }
  __builtin_memcpy(to + done, from + done, size_t(bytes - done));
}

// ---- Conversion of one register between storage and accumulation dtype ---------------------------

template <class T, class In>
struct Convert;

template <class T>
struct Convert<T, T> {
  static inline Vec<T> load_vec(const T* p) { return load<T>(p); }
  static inline void store_vec(T* p, const Vec<T>& v) { store<T>(p, v); }
};

template <>
struct Convert<float, BFloat16> {
  static inline Vec<float> load_vec(const BFloat16* p) {
    HalfBits half;
    __builtin_memcpy(&half, p, sizeof half);
    return (Vec<float>)(__builtin_convertvector(half, VecOf<float>::bits) << 16);
  }
  static inline void store_vec(BFloat16* p, const Vec<float>& v) {
    const VecOf<float>::bits bits = (VecOf<float>::bits)v;
    // To nearest, ties to even; the carry turns the largest numbers into infinity, as it should.
    const VecOf<float>::bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const VecOf<float>::bits nan = VecOf<float>::bits{} + 0x7fc0;
    const HalfBits half = __builtin_convertvector(v == v ? rounded : nan, HalfBits);
    __builtin_memcpy(p, &half, sizeof half);
  }
};

template <>
struct Convert<float, Half> {
#if SALKERNELS_VECTOR_BYTES == 64
  static inline Vec<float> load_vec(const Half* p) {
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }
  static inline void store_vec(Half* p, const Vec<float>& v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif SALKERNELS_VECTOR_BYTES == 32
  static inline Vec<float> load_vec(const Half* p) {
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  }
  static inline void store_vec(Half* p, const Vec<float>& v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  typedef VecOf<float>::bits Bits;
  static inline Vec<float> load_vec(const Half* p) {
    HalfBits half;
    __builtin_memcpy(&half, p, sizeof half);
    const Bits wide = __builtin_convertvector(half, Bits);
    const Bits magnitude = (wide & 0x7fff) << 13;
    // Moved into float's place the exponent is 112 too small; the product also mends subnormals.
    const Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;
    const Bits special = (Bits)(magnitude >= 0x7c00u << 13) & 0x7f800000u;
    return (Vec<float>)((Bits)scaled | special | ((wide & 0x8000) << 16));
  }
  static inline void store_vec(Half* p, const Vec<float>& v) {
    const Bits bits = (Bits)v, magnitude = bits & 0x7fffffff;
    // Below 2^-14 a half counts steps of 2^-24, as a float between 1/2 and 1 does.
    const Bits small = (Bits)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
    const Bits normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Bits infinity = Bits{} + 0x7c00, nan = Bits{} + 0x7e00;
    Bits half = magnitude < 0x38800000 ? small : normal;
    half = magnitude >= 0x477ff000 ? infinity : half;  // 65520 and above
    half = magnitude > 0x7f800000 ? nan : half;
    const HalfBits out = __builtin_convertvector(half | ((bits >> 16) & 0x8000), HalfBits);
    __builtin_memcpy(p, &out, sizeof out);
  }
#endif
};

// Fewer elements than a register holds; what lies beyond them is read as 0, and not written.
template <class T, class In>
static inline Vec<T> load_part(const In* p, int64_t count) {
#if SALKERNELS_VECTOR_BYTES == 64
  if constexpr (sizeof(In) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  }
#endif
  In part[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return Convert<T, In>::load_vec(part);
}
template <class T, class In>
static inline void store_part(In* p, const Vec<T>& v, int64_t count) {
#if SALKERNELS_VECTOR_BYTES == 64
  if constexpr (sizeof(In) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
    return;
  }
#endif
  In part[kLanes<T>];
  Convert<T, In>::store_vec(part, v);
  for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}
template <class T, class In>
static inline Vec<T> load_strided(const In* p, int64_t stride, int64_t count) {
  In part[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i * stride];
  return Convert<T, In>::load_vec(part);
}
template <class T, class In>
static inline void store_strided(In* p, const Vec<T>& v, int64_t stride, int64_t count) {
  In part[kLanes<T>];
  Convert<T, In>::store_vec(part, v);
  for (int64_t i = 0; i < count; ++i) p[i * stride] = part[i];
}

// ---- Shuffles: lane j of the result comes from lane j of a or b, moved by `Step` -----------------

template <class T, int Step, int... J>
static inline Vec<T> low_halves(const Vec<T>& a, const Vec<T>& b,
                                std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & Step) ? kLanes<T> + (J ^ Step) : J)...);
}
template <class T, int Step, int... J>
static inline Vec<T> high_halves(const Vec<T>& a, const Vec<T>& b,
                                 std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & Step) ? kLanes<T> + J : (J ^ Step))...);
}

// Lane j of the result is the sum over the lanes of v[j]. Two registers are halved into one at each
// step, so W sums take W - 1 additions of whole registers rather than W · log2(W):
//
//      W = 4        a0 a1 a2 a3
//                   b0 b1 b2 b3        a02 a13 c02 c13
//                   c0 c1 c2 c3        b02 b13 d02 d13        a0213 b0213 c0213 d0213
//                   d0 d1 d2 d3
//                                      (a02 = a0 + a2)
//
// The order of additions is the same for each j, so that a product does not depend on where in a
// block it was formed.
template <class T, int Step = kLanes<T> / 2>
static inline Vec<T> sum_lanes(Vec<T>* v) {
  using Lanes = std::make_integer_sequence<int, kLanes<T>>;
  for (int i = 0; i < Step; ++i) {
    v[i] = low_halves<T, Step>(v[i], v[i + Step], Lanes{}) +
           high_halves<T, Step>(v[i], v[i + Step], Lanes{});
  }
  if constexpr (Step > 1) {
    return sum_lanes<T, Step / 2>(v);
  } else {
    return v[0];
  }
}

// Square transpose in registers: blocks off the diagonal change places, of half the size each time.
//
//      a0 a1 | a2 a3        a0 a1 | c0 c1        a0 b0 c0 d0
//      b0 b1 | b2 b3        b0 b1 | d0 d1        a1 b1 c1 d1
//      ------+------   ->   ------+------   ->   a2 b2 c2 d2
//      c0 c1 | c2 c3        a2 a3 | c2 c3        a3 b3 c3 d3
//      d0 d1 | d2 d3        b2 b3 | d2 d3
template <class T, int Step = kLanes<T> / 2>
static inline void transpose(Vec<T>* v) {
  using Lanes = std::make_integer_sequence<int, kLanes<T>>;
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & Step) continue;
    const Vec<T> a = v[i], b = v[i + Step];
    v[i] = low_halves<T, Step>(a, b, Lanes{});
    v[i + Step] = high_halves<T, Step>(a, b, Lanes{});
  }
  if constexpr (Step > 1) transpose<T, Step / 2>(v);
}

template <class T>
static inline T total(const Vec<T>& v) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

// ---- Exponential ---------------------------------------------------------------------------------

template <class T>
struct ExpOf;
template <>
struct ExpOf<float> {
  static constexpr int kTerms = 7, kFraction = 23;
  static constexpr uint32_t kOne = 127;  // the exponent of 1
  static constexpr float kSmallest = -87.336f, kLargest = 89;
  static constexpr float kRound = 0x1.8p23f;
  // ln 2 in two parts, of which the first has so few bits that its multiples are exact.
  static constexpr float kHigh = 0x1.63p-1f, kLow = -0x1.bd0106p-13f;
};
template <>
struct ExpOf<double> {
  static constexpr int kTerms = 13, kFraction = 52;
  static constexpr uint64_t kOne = 1023;
  static constexpr double kSmallest = -708.39, kLargest = 710;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kHigh = 0x1.62e42feep-1, kLow = 0x1.a39ef35793c76p-33;
};

// e^x, to the last bit or two; 0 below the smallest normal number, and NaN of NaN.
//
//      x = n ln 2 + r,  |r| <= ln 2 / 2:     e^x = 2^n (1 + r + r^2/2! + ... )
//
// n comes out of the lowest bits of a number so large that its fraction counts whole ones.
template <class T>
static inline Vec<T> exponential(const Vec<T>& x) {
  using Of = ExpOf<T>;
  typedef typename VecOf<T>::bits Bits;
  const Vec<T> y = x > Of::kLargest ? splat<T>(Of::kLargest) : x;  // e^this is infinite
  const Vec<T> counted = y * T(1.4426950408889634) + Of::kRound;
  const Vec<T> n = counted - Of::kRound;
  const Vec<T> r = (y - n * Of::kHigh) - n * Of::kLow;
  T inverse[Of::kTerms + 1];  // of factorials: the compiler knows them
  inverse[0] = 1;
  SALKERNELS_UNROLL
  for (int k = 1; k <= Of::kTerms; ++k) inverse[k] = inverse[k - 1] / k;
  Vec<T> sum = splat<T>(inverse[Of::kTerms]);
  SALKERNELS_UNROLL
  for (int k = Of::kTerms - 1; k >= 0; --k) sum = sum * r + inverse[k];
  const Bits power = ((Bits)counted + Of::kOne) << Of::kFraction;
  return x < Of::kSmallest ? Vec<T>{} : sum * (Vec<T>)power;
}
