#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "hymoe/comm/mesh.h"
#include "hymoe/model/sharding.h"
#include "hymoe/train/optimizer.h"

namespace hymoe {

/// Adds up the gradients of a step over its micro-batches and over the ranks that hold the same parameters:
/// mesh.dp for what lives under Experts, mesh.data for the rest. They lie in flat buckets, in the order in
/// which backward passes make them; the sum of a bucket over the ranks starts when its last gradient is
/// there, while the backward pass goes on:
///
///   for (…) { buckets.before_backward(last); loss.backward(); }
///   buckets.finish();
///   optimizer.step(lr, optimizer.grad_norm());
///
/// Each rank of a group owns an equal part of every bucket: it counts that in the norm, writes it into
/// checkpoints and, sharded, updates it. Frozen parameters are in no bucket. A rank alone has no buffers:
/// gradients stay where the backward pass makes them.
///
/// c10d::Reducer overlaps as well, but knows one group, keeps gradients in the parameters' type, and has no
/// parts for a sharded optimizer; benchmarks/data_parallel.cpp measures both.
class GradientBuckets {
 public:
  struct Slot {
    ParameterShard of = {};
    int64_t at = 0;          // its first element in the bucket: a multiple of 64
    ElementRange part = {};  // its elements in this rank's part of the bucket
    bool counted = true;     // not a copy of what another tp rank counts and writes
    bool arrived = false;    // a gradient in this step
  };
  struct Bucket {
    Group group = {};
    std::vector<Slot> slots = {};
    int64_t numel = 0;       // a multiple of 64·|group|
    Tensor gradients = {};   // [numel] from a step's first gradient to release(); each .grad is a view
    Tensor parameters = {};  // [numel], sharded: the parameters are views
    size_t ready = 0;        // gradients of the last micro-batch that are there
    Pending sum = {};
  };

  /// Sharded, moves the parameters into buffers of their buckets. At most one object may hold a parameter.
  GradientBuckets(const std::vector<ParameterShard>& parameters, const Mesh& mesh,
                  const OptimizerConfig& config = {});
  ~GradientBuckets();
  GradientBuckets(const GradientBuckets&) = delete;
  GradientBuckets& operator=(const GradientBuckets&) = delete;

  /// Before each backward pass. In the step's last one, sums over the ranks start as gradients come.
  void before_backward(bool last);
  /// Returns when the sums are there: whole in every .grad or, sharded, in this rank's parts. Throws naming a
  /// parameter without a gradient: an expert that got no row has a zero gradient, none means a parameter that
  /// the loss does not reach.
  void finish();
  /// Sharded: brings every rank's part of a bucket's parameters to all.
  Pending start_gather(size_t bucket);
  /// Frees the gradients of a bucket.
  void release(size_t bucket);

  const std::vector<Bucket>& buckets() const { return buckets_; }
  const Mesh& mesh() const { return mesh_; }
  bool sharded() const { return sharded_; }
  /// Of the parameters.
  at::TensorOptions options() const;
  /// What this rank writes of all parameters, frozen ones too, viewing them. The ranks' parts together have
  /// every element once.
  std::vector<TensorPart> owned_parameters() const;

 private:
  struct Arrival;
  void close(Bucket bucket);
  void arrived(size_t bucket, size_t slot);
  void start_next();

  Mesh mesh_;
  bool sharded_, wide_;
  std::vector<Bucket> buckets_;
  std::vector<Slot> frozen_;
  bool last_ = false;
  size_t next_ = 0;  // bucket to start: the order is the same on all ranks
};

}  // namespace hymoe
