#include "hymoe/moe/router.h"

#include "hymoe/moe/segment_router.h"
#include "hymoe/moe/topk_router.h"

namespace hymoe {

void RouterConfig::check() const {
  routers().check(kind, "kind");
  const bool segment = kind == "segment";
  if (!segment && kind != "topk") return;
  if (segment && shared == "inside") {
    throw ConfigError("shared",
                      "a segment router scores windows, the shared expert takes rows: expected apart");
  }
  const bool by_bucket = segment && select != "top_k";
  if ((by_bucket ? bucket : top_k) == 1 && normalized() && shared == "apart") {
    throw ConfigError(
        by_bucket ? "bucket" : "top_k",
        "a single normalised weight is always 1 and the router would get no gradient: expected at least "
        "2, or normalize false" +
            std::string(segment ? "" : ", or shared inside") + ", got 1");
  }
}

double RouterConfig::experts_per_unit() const {
  const bool by_capacity = kind == "segment" && select != "top_k";
  return by_capacity ? std::min(capacity, static_cast<double>(bucket)) : static_cast<double>(top_k);
}

Registry<Router, RouterArgs>& routers() {
  static auto* registry = [] {
    auto* r = new Registry<Router, RouterArgs>;
    r->add("topk", [](const RouterArgs& args) { return std::make_shared<TopkRouter>(args); });
    r->add("segment", [](const RouterArgs& args) { return std::make_shared<SegmentRouter>(args); });
    return r;
  }();
  return *registry;
}

}  // namespace hymoe
