// The KAN convolution of polynomials, forward and backward, in float32 on a CPU. Called by cpp_kan_conv.py.
//
// A task is some rows of one block of channels. Its pixels are brought into a small buffer with the channels innermost,
// whatever the memory format, and tanh is taken there, once a pixel; so memory is read once and written once.
// Planes are powers: plane 0 is x, plane p is tanh(x)^p; a kernel has a weight for each tap and plane.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include <omp.h>

namespace {

constexpr int64_t kLanes = 8, kGroups = 4, kBlock = kLanes * kGroups;  // channels of a block
constexpr int64_t kBufferFloats = 32 * 1024;  // of a task's pixels, so that they stay in the second cache

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec fill(float value) { return value - Vec{}; }

// Within 2 units in the last place: a series below 0.625, 1 - 2 / (exp(2|x|) + 1) above (Cephes' tanhf and expf).
inline Vec tanh(Vec x) {
  const IntVec sign = (IntVec)x & INT32_MIN;
  Vec a = (Vec)((IntVec)x ^ sign);
  const Vec z = x * x;
  const Vec series =
      ((((-5.70498872745e-3f * z + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z -
       3.33332819422e-1f) * z * x + x;
  const IntVec is_small = a < 0.625f;
  a = a > 10.f ? fill(10.f) : a;  // there it is 1; nan stays
  const Vec y = 2.f * a, shift = fill(12582912.f);  // 1.5 * 2^23 rounds to an integer
  const Vec shifted = y * 1.44269504088896341f + shift, n = shifted - shift;
  const Vec r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  const Vec p = (((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
                  1.6666665459e-1f) * r + 5.0000001201e-1f) * (r * r) + r + 1.f;
  const Vec exp = p * (Vec)(((IntVec)shifted << 23) + (127 << 23));
  const Vec large = 1.f - 2.f / (exp + 1.f);
  return is_small ? series : (Vec)((IntVec)large | sign);
}

struct Strides {
  int64_t n, c, h, w;
};

// Field by field what cpp_kan_conv.py fills in.
struct Sizes {
  int64_t batch, channels, height, width, kernels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t degree, threads;
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t blocks() const { return (channels + kBlock - 1) / kBlock; }
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE

// The off-diagonal blocks of S x S change places.
template <int S, int... I>
void exchange(Vec* rows, std::integer_sequence<int, I...>) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & S)) {
      const Vec a = rows[i], b = rows[i + S];
      rows[i] = __builtin_shufflevector(a, b, (I & S ? int(kLanes) + I - S : I)...);
      rows[i + S] = __builtin_shufflevector(a, b, (I & S ? int(kLanes) + I : I + S)...);
    }
}
#endif
#endif

// to[j][i] = from[i][j]
void transpose(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows, int64_t columns) {
  int64_t done_rows = 0, done_columns = 0;
#ifdef HAS_SHUFFLE
  done_rows = rows / kLanes * kLanes, done_columns = columns / kLanes * kLanes;
  for (int64_t i = 0; i < done_rows; i += kLanes)
    for (int64_t j = 0; j < done_columns; j += kLanes) {
      Vec tile[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) tile[k] = load(from + (i + k) * from_stride + j);
      constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
      exchange<4>(tile, lanes), exchange<2>(tile, lanes), exchange<1>(tile, lanes);
      for (int64_t k = 0; k < kLanes; ++k) store(to + (j + k) * to_stride + i, tile[k]);
    }
#endif
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < done_rows ? done_columns : 0; j < columns; ++j)
      to[j * to_stride + i] = from[i * from_stride + j];
}

// width pixels of count channels to (width, kBlock); either the channels or the pixels of x lie side by side
void load_row(float* to, const float* from, Strides s, int64_t count, int64_t width) {
  if (count < kBlock) std::memset(to, 0, width * kBlock * sizeof(float));
  if (s.c == 1)
    for (int64_t i = 0; i < width; ++i) std::memcpy(to + i * kBlock, from + i * s.w, count * sizeof(float));
  else
    transpose(to, kBlock, from, s.c, count, width);
}

void store_row(float* to, const float* from, Strides s, int64_t count, int64_t width) {
  if (s.c == 1)
    for (int64_t i = 0; i < width; ++i) std::memcpy(to + i * s.w, from + i * kBlock, count * sizeof(float));
  else
    transpose(to, s.c, from, kBlock, width, count);
}

void tanh_row(float* to, const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLanes) store(to + i, tanh(load(from + i)));
}

int64_t rows_at_once(int64_t floats_a_row) { return std::max<int64_t>(kBufferFloats / floats_a_row, 1); }

template <int D>
void forward(const Sizes& z, const float* x, Strides xs, const float* weights, const int64_t* ws, const float* bias,
             const int64_t* bs, float* y, Strides ys) {
  const int64_t padded = z.width + 2 * z.pad_w, row = padded * kBlock, reach = z.dilation_h * (z.kernel_h - 1);
  const int64_t rows =
      std::min(std::max<int64_t>((rows_at_once(2 * row) - reach - 1) / z.stride_h + 1, 4), z.out_height);
  const int64_t strips = (z.out_height + rows - 1) / rows, in_rows = (rows - 1) * z.stride_h + reach + 1;
  const int64_t kernel = z.taps() * (D + 1) * kBlock, tasks = z.batch * z.blocks() * strips;
  const int64_t threads = std::min(z.threads, tasks), planes = in_rows * row, kernels = z.kernels * kernel;
  const int64_t floats = 2 * planes + kernels + z.out_width * kBlock;
  const std::unique_ptr<float[]> buffers(new float[threads * floats]);  // here, where it may fail
#pragma omp parallel num_threads(threads)
  {
    float *xb = buffers.get() + omp_get_thread_num() * floats, *ub = xb + planes, *wb = ub + planes, *yb = wb + kernels;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t strip = task % strips, c = task / strips % z.blocks() * kBlock, n = task / strips / z.blocks();
      const int64_t count = std::min(kBlock, z.channels - c);
      for (int64_t k = 0; k < z.kernels; ++k)
        for (int64_t t = 0; t < z.taps(); ++t)
          for (int64_t p = 0; p <= D; ++p) {
            const float* w = weights + p * ws[0] + k * ws[1] + c * ws[2] + t * ws[3];
            float* to = wb + k * kernel + (t * (D + 1) + p) * kBlock;
            for (int64_t i = 0; i < kBlock; ++i) to[i] = i < count ? w[i * ws[2]] : 0.f;
          }
      const int64_t first = strip * rows, last = std::min(first + rows, z.out_height);
      const int64_t top = first * z.stride_h - z.pad_h;
      for (int64_t r = 0; r < (last - first - 1) * z.stride_h + reach + 1; ++r) {
        float *xr = xb + r * row, *ur = ub + r * row;
        if (top + r < 0 || top + r >= z.height) {
          std::memset(xr, 0, row * sizeof(float));
          std::memset(ur, 0, row * sizeof(float));
          continue;
        }
        std::memset(xr, 0, z.pad_w * kBlock * sizeof(float));
        std::memset(xr + (padded - z.pad_w) * kBlock, 0, z.pad_w * kBlock * sizeof(float));
        load_row(xr + z.pad_w * kBlock, x + n * xs.n + c * xs.c + (top + r) * xs.h, xs, count, z.width);
        tanh_row(ur, xr, row);
      }
      for (int64_t k = 0; k < z.kernels; ++k)
        for (int64_t oy = first; oy < last; ++oy) {
          float start[kBlock] = {};
          if (bias)
            for (int64_t i = 0; i < count; ++i) start[i] = bias[k * bs[0] + (c + i) * bs[1]];
          for (int64_t ox = 0; ox < z.out_width; ++ox) {
            Vec sum[kGroups];
            for (int64_t g = 0; g < kGroups; ++g) sum[g] = load(start + g * kLanes);
            const float* w = wb + k * kernel;
            for (int64_t i = 0; i < z.kernel_h; ++i)
              for (int64_t j = 0; j < z.kernel_w; ++j, w += (D + 1) * kBlock) {
                const int64_t at = ((oy - first) * z.stride_h + i * z.dilation_h) * row +
                                   (ox * z.stride_w + j * z.dilation_w) * kBlock;
#pragma GCC unroll 4
                for (int64_t g = 0; g < kGroups * kLanes; g += kLanes) {
                  sum[g / kLanes] += load(w + g) * load(xb + at + g);
                  const Vec u = load(ub + at + g);
                  Vec power = load(w + D * kBlock + g);
#pragma GCC unroll 5
                  for (int p = D - 1; p > 0; --p) power = power * u + load(w + p * kBlock + g);
                  sum[g / kLanes] += power * u;
                }
              }
            for (int64_t g = 0; g < kGroups; ++g) store(yb + ox * kBlock + g * kLanes, sum[g]);
          }
          store_row(y + n * ys.n + (k * z.channels + c) * ys.c + oy * ys.h, yb, ys, count, z.out_width);
        }
    }
  }
}

struct Reach {  // an output that an input has a part in, and by which tap
  int64_t tap, out;
};

std::vector<std::vector<Reach>> reaches(int64_t size, int64_t taps, int64_t stride, int64_t pad, int64_t dilation,
                                        int64_t out) {
  std::vector<std::vector<Reach>> of(size);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t at = i + pad - dilation * t;
      if (at >= 0 && at % stride == 0 && at / stride < out) of[i].push_back({t, at / stride});
    }
  return of;
}

// Weights are (kernels, taps, D + 1), and so are the sums; one of a task, added up in the order of the tasks, so that
// the result does not depend on the threads.
template <int D>
void backward(const Sizes& z, const float* x, Strides xs, const float* grad, Strides gs, const float* weights,
              float* grad_x, Strides os, double* grad_weights) {
  const auto by_row = reaches(z.height, z.kernel_h, z.stride_h, z.pad_h, z.dilation_h, z.out_height);
  const auto by_column = reaches(z.width, z.kernel_w, z.stride_w, z.pad_w, z.dilation_w, z.out_width);
  const int64_t row = z.width * kBlock, out_row = z.out_width * kBlock, all = z.kernels * z.taps() * (D + 1);
  const int64_t rows = std::min(std::max<int64_t>(rows_at_once(2 * row), 4), z.height);
  const int64_t strips = (z.height + rows - 1) / rows, tasks = z.batch * z.blocks() * strips;
  const int64_t grad_rows = (rows + z.dilation_h * (z.kernel_h - 1)) / z.stride_h + 1;
  std::vector<double> sums(grad_weights ? tasks * all : 0);
  const int64_t threads = std::min(z.threads, tasks), planes = rows * row, grads = z.kernels * grad_rows * out_row;
  const int64_t floats = 2 * planes + grads + row;
  const std::unique_ptr<float[]> buffers(new float[threads * floats]);  // here, where it may fail
#pragma omp parallel num_threads(threads)
  {
    float *xb = buffers.get() + omp_get_thread_num() * floats, *ub = xb + planes, *gb = ub + planes, *yb = gb + grads;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t strip = task % strips, c = task / strips % z.blocks() * kBlock, n = task / strips / z.blocks();
      const int64_t count = std::min(kBlock, z.channels - c);
      const int64_t first = strip * rows, last = std::min(first + rows, z.height);
      int64_t from = z.out_height, to = 0;  // rows of the gradient
      for (int64_t i = first; i < last; ++i)
        for (const Reach& r : by_row[i]) from = std::min(from, r.out), to = std::max(to, r.out + 1);
      for (int64_t i = first; i < last; ++i) {
        float* xr = xb + (i - first) * row;
        load_row(xr, x + n * xs.n + c * xs.c + i * xs.h, xs, count, z.width);
        tanh_row(ub + (i - first) * row, xr, row);
      }
      for (int64_t k = 0; k < z.kernels; ++k)
        for (int64_t i = from; i < to; ++i)
          load_row(gb + (k * grad_rows + i - from) * out_row,
                   grad + n * gs.n + (k * z.channels + c) * gs.c + i * gs.h, gs, count, z.out_width);
      for (int64_t i = first; i < last; ++i) {
        const float *xr = xb + (i - first) * row, *ur = ub + (i - first) * row;
        if (grad_x) {
          for (int64_t j = 0; j < z.width; ++j)
            for (int64_t g = 0; g < kBlock; g += 2 * kLanes) {
              Vec plane[D + 1][2] = {};
              for (int64_t k = 0; k < z.kernels; ++k)
                for (const Reach& v : by_row[i])
                  for (const Reach& h : by_column[j]) {
                    const float* gp = gb + (k * grad_rows + v.out - from) * out_row + h.out * kBlock + g;
                    const float* w = weights + (k * z.taps() + v.tap * z.kernel_w + h.tap) * (D + 1);
                    const Vec g0 = load(gp), g1 = load(gp + kLanes);
#pragma GCC unroll 6
                    for (int p = 0; p <= D; ++p) plane[p][0] += w[p] * g0, plane[p][1] += w[p] * g1;
                  }
              for (int64_t m = 0; m < 2; ++m) {
                const Vec u = load(ur + j * kBlock + g + m * kLanes);
                Vec slope = (float)D * plane[D][m];  // of the polynomial, by Horner; then of tanh
#pragma GCC unroll 5
                for (int p = D - 1; p > 0; --p) slope = slope * u + (float)p * plane[p][m];
                store(yb + j * kBlock + g + m * kLanes, plane[0][m] + slope * (1.f - u * u));
              }
            }
          store_row(grad_x + n * os.n + c * os.c + i * os.h, yb, os, count, z.width);
        }
        if (grad_weights)
          for (int64_t k = 0; k < z.kernels; ++k)
            for (const Reach& v : by_row[i]) {
              const float* gr = gb + (k * grad_rows + v.out - from) * out_row;
              for (int64_t t = 0; t < z.kernel_w; ++t) {
                Vec sum[D + 1] = {};
                const int64_t offset = t * z.dilation_w - z.pad_w;
                const int64_t begin = offset >= 0 ? 0 : (-offset + z.stride_w - 1) / z.stride_w;
                const int64_t end =
                    z.width <= offset ? 0 : std::min(z.out_width, (z.width - 1 - offset) / z.stride_w + 1);
                for (int64_t o = begin; o < end; ++o) {
                  const int64_t at = (o * z.stride_w + offset) * kBlock;
#pragma GCC unroll 4
                  for (int64_t g = 0; g < kBlock; g += kLanes) {
                    Vec by = load(gr + o * kBlock + g);
                    sum[0] += by * load(xr + at + g);
                    const Vec u = load(ur + at + g);
#pragma GCC unroll 5
                    for (int p = 1; p <= D; ++p) by *= u, sum[p] += by;
                  }
                }
                double* of_task = sums.data() + task * all + (k * z.taps() + v.tap * z.kernel_w + t) * (D + 1);
                for (int p = 0; p <= D; ++p)
                  for (int64_t lane = 0; lane < kLanes; ++lane) of_task[p] += sum[p][lane];
              }
            }
      }
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) grad_weights[i % all] += sums[i];
}

// Whether there was enough memory.
template <int D = 1, class Call>
bool with_degree(int64_t degree, Call call) {
  if constexpr (D <= 5) {  // MAX_MONOMIAL_DEGREE
    if (degree != D) return with_degree<D + 1>(degree, call);
    try {
      call(std::integral_constant<int, D>());
    } catch (const std::bad_alloc&) {
      return false;
    }
  }
  return true;
}

}  // namespace

extern "C" {

// Strides are of elements: of x, y and their gradients by (n, c, h, w), of weights by (plane, kernel,
// channel, tap), of the bias by (kernel, channel).
bool kan_conv_forward(const Sizes* z, const float* x, const Strides* xs, const float* weights, const int64_t* ws,
                      const float* bias, const int64_t* bs, float* y, const Strides* ys) {
  return with_degree(z->degree, [&](auto d) { forward<d.value>(*z, x, *xs, weights, ws, bias, bs, y, *ys); });
}

// grad_x or grad_weights (zeros) may be null: not wanted.
bool kan_conv_backward(const Sizes* z, const float* x, const Strides* xs, const float* grad, const Strides* gs,
                       const float* weights, float* grad_x, const Strides* os, double* grad_weights) {
  return with_degree(z->degree, [&](auto d) {
    backward<d.value>(*z, x, *xs, grad, *gs, weights, grad_x, *os, grad_weights);
  });
}
}
