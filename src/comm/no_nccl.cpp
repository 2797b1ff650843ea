#include "comm/communicator.h"
#include "hymoe/config/error.h"

namespace hymoe {

c10::intrusive_ptr<c10d::Backend> make_nccl(const c10::intrusive_ptr<c10d::Store>&, int, int,
                                            std::chrono::milliseconds) {
  throw Error(
      "this build of hymoe has no NCCL, for processes on GPUs: build it with a CUDA build of LibTorch");
}

}  // namespace hymoe
