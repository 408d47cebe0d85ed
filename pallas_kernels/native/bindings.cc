// The calls that XLA makes. Their operands are in the order in which `operands.py` has them.

#include <exception>
#include <string>

#include "attention.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using chunks::Ints;

class Problem : public std::exception {
 public:
  explicit Problem(std::string what) : what_(std::move(what)) {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

// Takes one operand after another.
class Operands {
 public:
  explicit Operands(ffi::RemainingArgs all) : all_(all) {}

  ffi::AnyBuffer any() {
    auto next = all_.get<ffi::AnyBuffer>(index_++);
    if (!next.has_value()) throw Problem("there are fewer operands than expected");
    return *next;
  }

  ffi::AnyBuffer of(ffi::DataType type) {
    ffi::AnyBuffer next = any();
    if (next.element_type() != type)
      throw Problem("operand " + std::to_string(index_ - 1) + " has another type than expected");
    return next;
  }

  const int32_t* ints(int64_t* size = nullptr) {
    ffi::AnyBuffer next = of(ffi::S32);
    if (size) *size = next.element_count();
    return next.element_count() ? next.typed_data<int32_t>() : nullptr;
  }

  // An array whose first axis is over windows.
  Ints by_window(int64_t* windows = nullptr) {
    ffi::AnyBuffer next = of(ffi::S32);
    if (next.element_count() == 0) return {};
    if (windows) *windows = next.dimensions()[0];
    return {next.typed_data<int32_t>(), (int64_t)next.element_count() / next.dimensions()[0]};
  }

 private:
  ffi::RemainingArgs all_;
  size_t index_ = 0;
};

chunks::Type type_of(ffi::AnyBuffer buffer) {
  switch (buffer.element_type()) {
    case ffi::F32: return chunks::Type::float32;
    case ffi::BF16: return chunks::Type::bfloat16;
    case ffi::F16: return chunks::Type::float16;
    default: throw Problem("keys and values must be float32, bfloat16 or float16");
  }
}

// What both calls begin with: queries, windows of heads, layer, items, and what windows hide.
struct Common {
  chunks::Attention call;
  chunks::Plan plan;
  int64_t layer;

  Common(Operands& operands, float scale, float softcap, ffi::Result<ffi::AnyBuffer> output) {
    ffi::AnyBuffer q = operands.of(ffi::F32);
    call.scale = scale;
    call.softcap = softcap;
    call.queries = q.typed_data<float>();
    call.output = output->typed_data<float>();
    call.query_heads = q.dimensions()[1];
    call.dim = q.dimensions()[2];
    call.head_windows = operands.ints();
    layer = *operands.ints();
    plan.rows = q.dimensions()[0];
    chunks::Items& items = plan.items;
    items.row_begin = operands.by_window();
    items.row_count = operands.by_window();
    items.chunk_begin = operands.by_window();
    items.chunk_count = operands.by_window();
    items.chunks = operands.by_window();
    int64_t windows = 1;
    items.count = operands.by_window(&windows);
    plan.windows = windows;
    chunks::Hidden& hidden = plan.hidden;
    hidden.size = operands.by_window();
    hidden.sinks = operands.by_window();
    hidden.begin = operands.by_window();
    hidden.offset = operands.by_window();
  }

  template <class Add>
  ffi::Error attend(ffi::ThreadPool pool, Operands& operands, const chunks::ExactTokens& exact,
                    Add add) {
    ffi::AnyBuffer keys = operands.any(), values = operands.any();
    auto sizes = keys.dimensions();  // layers, heads, chunks, tokens, dim
    call.kv_heads = sizes[1];
    int64_t of_layer = sizes[1] * sizes[2] * sizes[3] * sizes[4];
    int64_t at = std::clamp<int64_t>(layer, 0, sizes[0] - 1) * of_layer;
    auto with = [&](auto element) {
      using T = decltype(element);
      chunks::ExactPool<T> stored{(const T*)keys.untyped_data() + at,
                                  (const T*)values.untyped_data() + at, sizes[2], (int)sizes[3],
                                  (int)sizes[4]};
      auto schedule = [&](auto task) { pool.Schedule(std::move(task)); };
      auto of_window = [&](chunks::Units& units, int window) {
        add(units, window, (int)sizes[3]);
      };
      chunks::attend(call, plan, stored, exact, of_window, pool.num_threads(), schedule);
    };
    switch (type_of(keys)) {
      case chunks::Type::float32: with(0.0f); break;
      case chunks::Type::bfloat16: with(chunks::BFloat16{}); break;
      case chunks::Type::float16: with(chunks::Float16{}); break;
    }
    return ffi::Error::Success();
  }
};

chunks::ExactTokens exact_tokens(ffi::AnyBuffer keys, ffi::AnyBuffer values) {
  chunks::ExactTokens exact;
  exact.type = type_of(keys);
  exact.keys = keys.untyped_data();
  exact.values = values.untyped_data();
  return exact;
}

ffi::Error decode(ffi::ThreadPool pool, float scale, float softcap, ffi::RemainingArgs arguments,
                  ffi::Result<ffi::AnyBuffer> output) try {
  Operands operands(arguments);
  Common common(operands, scale, softcap, output);
  chunks::DecodePlan plan;
  plan.private_chunks = operands.by_window();
  plan.covered = operands.by_window();
  plan.lengths = operands.ints();
  plan.tile_chunks = operands.by_window();
  plan.tile_rows = operands.by_window();
  plan.tile_count = operands.by_window();
  plan.own_slots = operands.ints();
  ffi::AnyBuffer own_keys = operands.any(), own_values = operands.any();
  chunks::ExactTokens own = exact_tokens(own_keys, own_values);
  if (plan.own_slots) {
    auto sizes = own_keys.dimensions();  // layers, heads, slots, tokens, dim
    plan.slots = own.slots = sizes[2];
    int64_t of_layer = sizes[1] * sizes[2] * sizes[3] * sizes[4] * (int64_t)sizeof(float);
    if (own.type != chunks::Type::float32) of_layer /= 2;
    own.keys = (const char*)own.keys + common.layer * of_layer;
    own.values = (const char*)own.values + common.layer * of_layer;
  }
  return common.attend(pool, operands, own, [&](chunks::Units& units, int window, int chunk_size) {
    add_decoding(units, common.plan, plan, window, chunk_size);
  });
} catch (const std::exception& error) {
  return ffi::Error::Internal(error.what());
}

ffi::Error prefill(ffi::ThreadPool pool, float scale, float softcap, ffi::RemainingArgs arguments,
                   ffi::Result<ffi::AnyBuffer> output) try {
  Operands operands(arguments);
  Common common(operands, scale, softcap, output);
  chunks::PrefillPlan plan;
  plan.tile_begin = operands.ints(&plan.tiles);
  plan.tile_count = operands.ints();
  plan.tile_position = operands.ints();
  plan.tile_sequence = operands.ints();
  plan.num_tiles = operands.ints();
  plan.own_chunk = operands.by_window();
  plan.tables = operands.by_window();
  ffi::AnyBuffer keys = operands.any(), values = operands.any();
  plan.has_fresh = keys.element_count() > 0;
  chunks::ExactTokens fresh = exact_tokens(keys, values);
  return common.attend(pool, operands, fresh,
                       [&](chunks::Units& units, int window, int chunk_size) {
                         add_prefill(units, common.plan, plan, window, chunk_size);
                       });
} catch (const std::exception& error) {
  return ffi::Error::Internal(error.what());
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<float>("scale")
      .Attr<float>("softcap")
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(chunk_attention_decode, decode, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(chunk_attention_prefill, prefill, binding());
