#pragma once

#include "hymoe/comm/group.h"

namespace hymoe {

/// How the ranks share the work, one group a kind of parallelism.
struct Mesh {
  Group dp;  // data: each rank has its own documents
  Group ep;  // experts: each rank has some experts of every branch
  Group tp;  // tensors: each rank has a slice of every matrix
};

}  // namespace hymoe
