#include "hymoe/model/outline.h"

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace hymoe {

Transformer outline(const ModelConfig& config, const Mesh& mesh) {
  // Functions that make tensors go to the meta device whatever device their options say: it is of higher
  // priority, and what would look at the options is left out.
  const c10::impl::IncludeDispatchKeyGuard meta(c10::DispatchKey::Meta);
  const c10::impl::ExcludeDispatchKeyGuard no_select(c10::DispatchKey::BackendSelect);
  return Transformer(config, mesh, Init::kNone);
}

}  // namespace hymoe
