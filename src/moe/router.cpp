#include "hymoe/moe/router.h"

#include "hymoe/moe/segment_router.h"
#include "hymoe/moe/topk_router.h"

namespace hymoe {

namespace {

// Kinds that take rows as the segment router takes windows of one row.
bool chooses_rows(const RouterConfig& config) {
  return config.kind == "expert_choice" || config.kind == "threshold";
}

bool by_capacity(const RouterConfig& config) {
  return chooses_rows(config) || (config.kind == "segment" && config.select != "top_k");
}

std::shared_ptr<Router> make_row_chooser(RouterArgs args) {
  args.config.select = args.config.kind;
  args.config.score = "own";
  args.config.segment_len = 1;
  return std::make_shared<SegmentRouter>(args);
}

}  // namespace

void RouterConfig::check() const {
  routers().check(kind, "kind");
  const bool segment = kind == "segment" || chooses_rows(*this);
  if (!segment && kind != "topk") return;
  if (segment && shared == "inside") {
    throw ConfigError("shared",
                      "a segment router scores windows, the shared expert takes rows: expected apart");
  }
  if (segment && select == "prefix_choice" && capacity_unit == "rows") {
    throw ConfigError("capacity_unit", "prefix_choice counts windows: expected windows, got rows");
  }
  const bool by_bucket = by_capacity(*this);
  if ((by_bucket ? bucket : top_k) == 1 && normalized() && shared == "apart") {
    throw ConfigError(
        by_bucket ? "bucket" : "top_k",
        "a single normalised weight is always 1 and the router would get no gradient: expected at least "
        "2, or normalize false" +
            std::string(segment ? "" : ", or shared inside") + ", got 1");
  }
}

double RouterConfig::experts_per_unit() const {
  return by_capacity(*this) ? std::min(capacity, static_cast<double>(bucket)) : static_cast<double>(top_k);
}

Registry<Router, RouterArgs>& routers() {
  static auto* registry = [] {
    auto* r = new Registry<Router, RouterArgs>;
    r->add("topk", [](const RouterArgs& args) { return std::make_shared<TopkRouter>(args); });
    r->add("segment", [](const RouterArgs& args) { return std::make_shared<SegmentRouter>(args); });
    r->add("expert_choice", make_row_chooser);
    r->add("threshold", make_row_chooser);
    return r;
  }();
  return *registry;
}

}  // namespace hymoe
