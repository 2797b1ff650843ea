#include "hymoe/comm/group.h"

#include <algorithm>
#include <numeric>
#include <sstream>
#include <utility>

#include <torch/types.h>

#include "comm/communicator.h"

namespace hymoe {
namespace {

thread_local std::string current_place;

[[noreturn]] void fail(const Communicator& communicator, const std::string& operation,
                       const std::string& place, const std::string& cause) {
  const std::string missing = communicator.watch ? communicator.watch->missing_ranks() : "";
  throw CommError("rank " + std::to_string(communicator.backend->getRank()) + " of " +
                  std::to_string(communicator.backend->getSize()) + " of group " + communicator.name + ": " +
                  operation + (place.empty() ? "" : " in " + place) +
                  " failed: " + cause.substr(0, cause.find('\n')) + (missing.empty() ? "" : "; " + missing));
}

// This rank's of `size` equal parts of a tensor.
Tensor part_of(const char* operation, const Tensor& tensor, int64_t rank, int64_t size) {
  TORCH_CHECK(tensor.dim() > 0 && tensor.size(0) % size == 0 && tensor.is_contiguous(), operation,
              ": the tensor must be contiguous, its first size a multiple of ", size, ", got ",
              tensor.sizes(), " with strides ", tensor.strides());
  return tensor.narrow(0, rank * (tensor.size(0) / size), tensor.size(0) / size);
}

int64_t total(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

}  // namespace

struct Pending::State {
  std::shared_ptr<const Communicator> communicator;
  c10::intrusive_ptr<c10d::Work> work;
  std::string operation, place;
  std::vector<Tensor> held;  // alive until the work is done
};

/// Starts collectives of one group.
struct Launch {
  const std::shared_ptr<const Communicator>& communicator;

  template <typename Start>
  Pending operator()(const char* name, std::vector<Tensor> tensors, const Start& start) const {
    std::ostringstream operation;
    operation << name << " of " << tensors[0].sizes() << " " << tensors[0].scalar_type();
    count(name, tensors);
    if (communicator->watch) ++communicator->watch->started;
    Pending pending;
    try {
      auto work = start(*communicator->backend);
      pending.state_ = std::make_shared<Pending::State>(
          Pending::State{communicator, std::move(work), operation.str(), current_place, std::move(tensors)});
    } catch (const std::exception& error) {
      fail(*communicator, operation.str(), current_place, error.what());
    }
    return pending;
  }

  void count(const char* name, const std::vector<Tensor>& tensors) const {
    size_t bytes = 0;
    for (const Tensor& tensor : tensors) bytes = std::max(bytes, tensor.nbytes());
    const std::lock_guard lock(communicator->mutex);
    Traffic& traffic = communicator->traffic[name];
    traffic.calls += 1;
    traffic.bytes += static_cast<int64_t>(bytes);
  }

  Pending all_reduce(Tensor& tensor, c10d::ReduceOp::RedOpType op) const {
    TORCH_CHECK(tensor.is_contiguous(), "all_reduce: the tensor must be contiguous, got ", tensor.sizes(),
                " with strides ", tensor.strides());
    return (*this)("all_reduce", {tensor}, [&](c10d::Backend& backend) {
      std::vector<Tensor> tensors{tensor};
      c10d::AllreduceOptions options;
      options.reduceOp = op;
      return backend.allreduce(tensors, options);
    });
  }
};

void Pending::wait() {
  if (!state_) return;
  const auto state = std::exchange(state_, nullptr);
  try {
    state->work->wait();
  } catch (const std::exception& error) {
    fail(*state->communicator, state->operation, state->place, error.what());
  }
}

Group::Group(std::shared_ptr<const Communicator> communicator)
    : communicator_(std::move(communicator)),
      rank_(communicator_ ? communicator_->backend->getRank() : 0),
      size_(communicator_ ? communicator_->backend->getSize() : 1) {}

void Group::all_reduce_sum(Tensor& tensor) const {
  if (communicator_) Launch{communicator_}.all_reduce(tensor, c10d::ReduceOp::SUM).wait();
}

void Group::all_reduce_max(Tensor& tensor) const {
  if (communicator_) Launch{communicator_}.all_reduce(tensor, c10d::ReduceOp::MAX).wait();
}

void Group::all_reduce_mean(Tensor& tensor) const {
  if (!communicator_) return;
  all_reduce_sum(tensor);
  tensor.div_(size_);
}

Pending Group::start_all_reduce_sum(Tensor& tensor) const {
  if (!communicator_) return {};
  return Launch{communicator_}.all_reduce(tensor, c10d::ReduceOp::SUM);
}

void Group::broadcast(Tensor& tensor, int64_t root) const {
  if (!communicator_) return;
  Tensor whole = tensor.contiguous();
  Launch{communicator_}("broadcast", {whole}, [&](c10d::Backend& backend) {
    std::vector<Tensor> tensors{whole};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return backend.broadcast(tensors, options);
  }).wait();
  if (!whole.is_same(tensor)) tensor.copy_(whole);
}

Tensor Group::all_gather(const Tensor& tensor) const {
  if (!communicator_) return tensor;
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.at(0) *= size_;
  Tensor part = tensor.contiguous(), all = at::empty(sizes, tensor.options());
  Launch{communicator_}("all_gather", {part, all}, [&](c10d::Backend& backend) {
    return backend._allgather_base(all, part);
  }).wait();
  return all;
}

Tensor Group::reduce_scatter_sum(const Tensor& tensor) const {
  if (!communicator_) return tensor;
  TORCH_CHECK(tensor.dim() > 0 && tensor.size(0) % size_ == 0,
              "reduce_scatter_sum: the first size must be a ", "multiple of ", size_, ", got ",
              tensor.sizes());
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes[0] /= size_;
  Tensor all = tensor.contiguous(), part = at::empty(sizes, tensor.options());
  Launch{communicator_}("reduce_scatter", {all, part}, [&](c10d::Backend& backend) {
    return backend._reduce_scatter_base(part, all);
  }).wait();
  return part;
}

Pending Group::start_reduce_scatter_sum(Tensor& tensor) const {
  if (!communicator_) return {};
  Tensor part = part_of("reduce_scatter", tensor, rank_, size_);
  return Launch{communicator_}("reduce_scatter", {tensor, part}, [&](c10d::Backend& backend) {
    return backend._reduce_scatter_base(part, tensor);
  });
}

Pending Group::start_all_gather(Tensor& tensor) const {
  if (!communicator_) return {};
  Tensor part = part_of("all_gather", tensor, rank_, size_);
  return Launch{communicator_}("all_gather", {tensor, part},
                               [&](c10d::Backend& backend) { return backend._allgather_base(tensor, part); });
}

Pending Group::start_all_to_all(const Tensor& rows, const std::vector<int64_t>& send,
                                const std::vector<int64_t>& receive, Tensor& received) const {
  const auto ranks = static_cast<size_t>(size_);
  TORCH_CHECK(
      rows.dim() > 0 && send.size() == ranks && receive.size() == ranks && total(send) == rows.size(0),
      "all_to_all: rows must be [R, ...] and send and receive have ", size_,
      " counts, those of send adding up to R, got ", rows.sizes(), ", ", send, " and ", receive);
  if (!communicator_) {
    received = rows;
    return {};
  }
  std::vector<int64_t> sizes = rows.sizes().vec();
  sizes[0] = total(receive);
  Tensor all = rows.contiguous(), result = at::empty(sizes, rows.options());
  received = result;
  return Launch{communicator_}("all_to_all", {all, result}, [&](c10d::Backend& backend) {
    std::vector<int64_t> in = send, out = receive;
    return backend.alltoall_base(result, all, out, in);
  });
}

Tensor Group::all_to_all(const Tensor& rows, const std::vector<int64_t>& send,
                         const std::vector<int64_t>& receive) const {
  Tensor received;
  start_all_to_all(rows, send, receive, received).wait();
  return received;
}

std::map<std::string, Traffic> Group::traffic() const {
  if (!communicator_) return {};
  const std::lock_guard lock(communicator_->mutex);
  return communicator_->traffic;
}

at::Device Group::device() const {
  return communicator_ && communicator_->backend->getBackendName() == "nccl" ? at::kCUDA : at::kCPU;
}

void Group::barrier() const {
  if (!communicator_) return;
  Tensor nothing = at::zeros({1}, device());
  all_reduce_sum(nothing);  // Gloo's own barrier takes no time limit
}

Where::Where(std::string place) : before_(std::exchange(current_place, std::move(place))) {}

Where::~Where() { current_place = std::move(before_); }

const std::string& Where::place() { return current_place; }

}  // namespace hymoe
