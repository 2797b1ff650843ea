#include "kernels/adamw.h"

#include <cmath>
#include <type_traits>

#include "kernels/device.h"

namespace hymoe::kernels {
namespace {

constexpr int kWidth = 4;

struct Factors {
  float scale, beta1_left, beta2_left, decay, rate, root, eps;
};

// Written so that the compiler has no choice where to fuse: a parameter has the same bits in whatever part of
// it a thread or a rank updates.
__device__ __forceinline__ void update(float gradient, float& target, float& m, float& v, const Factors& f) {
  const float g = gradient / f.scale;
  m = std::fma(f.beta1_left, g - m, m);
  v = std::fma(f.beta2_left, std::fma(g, g, -v), v);
  target = std::fma(f.decay, target, -(f.rate * m / (std::sqrt(v) / f.root + f.eps)));
}

template <class G, class P, int N>
__device__ __forceinline__ void update_at(Global<const G> gradient, Global<float> target, Global<float> m,
                                          Global<float> v, Global<P> parameter, int64_t i, const Factors& f) {
  const auto g = load<N>(gradient, i);
  Vector<float, N> targets = load<N>(target, i), ms = load<N>(m, i), vs = load<N>(v, i);
  Vector<P, N> rounded;
  for (int j = 0; j < N; ++j) {
    update(static_cast<float>(g.at[j]), targets.at[j], ms.at[j], vs.at[j], f);
    rounded.at[j] = static_cast<P>(targets.at[j]);
  }
  store<N>(target, i, targets);
  store<N>(m, i, ms);
  store<N>(v, i, vs);
  if (parameter) store<N>(parameter, i, rounded);
}

template <class G, class P, int N>
__global__ void adamw_kernel(Global<const G> gradient, Global<float> target, Global<float> m, Global<float> v,
                             Global<P> parameter, int64_t n, Factors f) {
  int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (i + N <= n) return update_at<G, P, N>(gradient, target, m, v, parameter, i, f);
  for (; i < n; ++i) update_at<G, P, 1>(gradient, target, m, v, parameter, i, f);
}

template <class G, class P>
void launch_adamw(const AdamW& a, Stream stream) {
  const auto aligned = [](const void* address, size_t size) {
    return reinterpret_cast<uintptr_t>(address) % (kWidth * size) == 0;
  };
  const auto with = [&](auto width) {
    const int64_t threads = (a.n + width - 1) / width;
    launch("adamw", adamw_kernel<G, P, width>, (threads + kRowThreads - 1) / kRowThreads, kRowThreads, stream,
           static_cast<const G*>(a.gradient), a.target, a.m, a.v, static_cast<P*>(a.parameter), a.n,
           Factors{a.scale, a.beta1_left, a.beta2_left, a.decay, a.rate, a.root, a.eps});
  };
  if (aligned(a.gradient, sizeof(G)) && aligned(a.target, 4) && aligned(a.m, 4) && aligned(a.v, 4) &&
      aligned(a.parameter, sizeof(P))) {
    return with(std::integral_constant<int, kWidth>{});
  }
  with(std::integral_constant<int, 1>{});
}

}  // namespace

void adamw(const AdamW& a, Stream stream) {
  with_type(a.parameter_type, [&](auto type) {
    using P = decltype(type);
    if constexpr (!std::is_same_v<P, double>) {
      if (a.gradient_type == a.parameter_type) return launch_adamw<P, P>(a, stream);
      launch_adamw<float, P>(a, stream);
    }
  });
}

}  // namespace hymoe::kernels
