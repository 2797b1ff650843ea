#include "hymoe/comm/collectives.h"

#include <utility>

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

namespace hymoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// What a backward needs of its forward's call, beside tensors.
struct Call {
  Group group;
  std::string place;
};

// Carries a value in an autograd context.
template <typename T>
struct Capsule : torch::CustomClassHolder {
  explicit Capsule(T held) : value(std::move(held)) {}
  T value;
};

template <typename T>
void remember(AutogradContext* ctx, T value) {
  ctx->saved_data["call"] = c10::IValue::make_capsule(c10::make_intrusive<Capsule<T>>(std::move(value)));
}

template <typename T>
T recall(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Capsule<T>>(ctx->saved_data["call"].toCapsule())->value;
}

Tensor summed(const Tensor& x, const Group& group) {
  Tensor sum = x.clone(at::MemoryFormat::Contiguous);
  group.all_reduce_sum(sum);
  return sum;
}

struct CopyToRanks : Function<CopyToRanks> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Group& group) {
    remember(ctx, Call{group, Where::place()});
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Call call = recall<Call>(ctx);
    const Where where(call.place);
    return {summed(gradients[0], call.group), {}};
  }
};

struct SumOverRanks : Function<SumOverRanks> {
  static Tensor forward(AutogradContext*, const Tensor& x, const Group& group) { return summed(x, group); }
  static variable_list backward(AutogradContext*, const variable_list& gradients) {
    return {gradients[0], {}};
  }
};

struct GatherRows : Function<GatherRows> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Group& group) {
    remember(ctx, Call{group, Where::place()});
    return group.all_gather(x);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Call call = recall<Call>(ctx);
    const Where where(call.place);
    return {call.group.reduce_scatter_sum(gradients[0]), {}};
  }
};

}  // namespace

struct RowExchange::State {
  Group group;
  std::string place;
  std::vector<int64_t> send, receive;
  Pending forth, back;
  Tensor packed;    // what is sent, then what comes, until the exchange has it
  Tensor gradient;  // of the rows sent, under way
};

// The graph's two ends of an exchange: what one starts the other finishes, in both directions.
struct StartExchange : Function<StartExchange> {
  using State = std::shared_ptr<RowExchange::State>;
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const State& state) {
    remember(ctx, state);
    Tensor& packed = state->packed;
    Tensor received;
    state->forth = state->group.start_all_to_all(packed.defined() ? packed : rows, state->send,
                                                 state->receive, received);
    if (!packed.defined()) return received;
    packed = received;
    std::vector<int64_t> sizes = rows.sizes().vec();
    sizes[0] = received.size(0);
    return at::empty({}, rows.options()).expand(sizes);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    const State state = recall<State>(ctx);
    state->back.wait();
    return {std::exchange(state->gradient, Tensor()), {}};
  }
};

struct FinishExchange : Function<FinishExchange> {
  using State = std::shared_ptr<RowExchange::State>;
  static Tensor forward(AutogradContext* ctx, const Tensor& received, const State& state) {
    remember(ctx, state);
    state->forth.wait();
    return received.view_as(received);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const State state = recall<State>(ctx);
    const Where where(state->place);
    state->back = state->group.start_all_to_all(gradients[0], state->receive, state->send, state->gradient);
    return {gradients[0], {}};
  }
};

Tensor copy_to_ranks(const Tensor& x, const Group& group) {
  return group.size() == 1 ? x : CopyToRanks::apply(x, group);
}

Tensor sum_over_ranks(const Tensor& x, const Group& group) {
  return group.size() == 1 ? x : SumOverRanks::apply(x, group);
}

Tensor gather_rows(const Tensor& x, const Group& group) {
  return group.size() == 1 ? x : GatherRows::apply(x, group);
}

RowExchange::RowExchange(const Tensor& rows, std::vector<int64_t> send, std::vector<int64_t> receive,
                         const Group& group, const Tensor& packed)
    : state_(std::make_shared<State>()) {
  state_->group = group;
  state_->place = Where::place();
  state_->send = std::move(send);
  state_->receive = std::move(receive);
  state_->packed = packed;
  received_ = group.size() == 1 ? rows : StartExchange::apply(rows, state_);
  packed_ = std::exchange(state_->packed, Tensor());
}

Tensor RowExchange::finish() {
  return state_->group.size() == 1 ? received_ : FinishExchange::apply(received_, state_);
}

}  // namespace hymoe
