#include "arguments.h"

namespace logra::cuda {
namespace {

constexpr std::int64_t kChunk = 128;  // the kernels' CHUNK, which is checked below

void check_side(const logra_cuda_tokens* tokens, const logra_cuda_matrix* proj, bool packed, const char* name,
                const char* proj_name) {
  expect(tokens != nullptr, std::string(name) + ": expected tokens, got NULL");
  dtype_name(tokens->dtype, name);
  check_size(tokens->dim, std::string(name) + ".dim");
  expect(tokens->token_stride >= 0 && (packed || tokens->example_stride >= 0),
         std::string(name) + ": expected strides of 0 or more");
  if (proj == nullptr) return;
  check(proj, proj_name);
  expect_as(proj->cols, tokens->dim, std::string(proj_name) + ".cols", name);
  expect_dtype_as(proj->dtype, tokens->dtype, proj_name, name);
}

bool aligned_side(const logra_cuda_tokens& tokens, const logra_cuda_matrix* proj, bool packed,
                  std::int64_t rank) {
  return divides(tokens.data) && divides(tokens.dim) && divides(tokens.token_stride) && divides(rank) &&
         (packed || divides(tokens.example_stride)) && (proj == nullptr || aligned(*proj));
}

/// Which elements of a gradient a row holds.
struct Chosen {
  std::int64_t count;
  const std::int32_t* positions;
  const float* scale;
};

/// What one call is given, and the memory that it takes.
struct Plan {
  const logra_cuda_examples* examples;
  const logra_cuda_tokens *x, *dy;
  const logra_cuda_matrix *proj_in, *proj_out;
  const Chosen* chosen;  // null for whole gradients
  bool packed;
  std::int64_t rank_in, rank_out, chunks, slots;
  std::uint8_t* keep_all;
  float* ones = nullptr;
  float* partial = nullptr;

  Plan(const logra_cuda_examples* which, const logra_cuda_tokens* x_side, const logra_cuda_tokens* dy_side,
       const logra_cuda_matrix* in, const logra_cuda_matrix* out, const Chosen* some, Workspace& workspace)
      : examples(which), x(x_side), dy(dy_side), proj_in(in), proj_out(out), chosen(some) {
    expect(examples != nullptr, "examples: expected a description, got NULL");
    check_size(examples->num_examples, "num_examples");
    check_size(examples->num_tokens, "num_tokens");
    packed = examples->cu_seqlens != nullptr;
    check_side(x, proj_in, packed, "x", "proj_in");
    check_side(dy, proj_out, packed, "dy", "proj_out");
    const bool projected = x->dtype == LOGRA_CUDA_FLOAT32 && proj_in == nullptr;
    expect(x->dtype == dy->dtype || projected,
           std::string("dy.dtype: expected ") + dtype_name(x->dtype, "x") + " as x has, got " +
               dtype_name(dy->dtype, "dy") + "; only an x that is projected already may differ, in float32");
    rank_in = proj_in != nullptr ? proj_in->rows : x->dim;
    rank_out = proj_out != nullptr ? proj_out->rows : dy->dim;
    expect(rank_in * rank_out <= INT32_MAX, "proj_in, proj_out: the gradient has 2^31 elements or more");
    if (chosen != nullptr)
      expect(0 <= chosen->count && chosen->count <= rank_in * rank_out,
             "count: expected 0 to " + std::to_string(rank_in * rank_out) +
                 ", the gradient's elements, got " + std::to_string(chosen->count));
    chunks = std::max<std::int64_t>(1, ceil_div(examples->num_tokens, kChunk));
    slots = packed ? examples->num_tokens / kChunk + examples->num_examples : examples->num_examples * chunks;
    keep_all = workspace.take<std::uint8_t>(1);
    if (chosen != nullptr) ones = workspace.take<float>(chosen->count);
    if (chunks > 1) partial = workspace.take<float>(slots * size());
  }
  std::int64_t size() const { return chosen != nullptr ? chosen->count : rank_in * rank_out; }
};

const Kernel& gradients_kernel(const Plan& plan, const float* out, const float* partial) {
  const logra_cuda_tokens &x = *plan.x, &dy = *plan.dy;
  const bool fast = divides(out) && divides(partial) &&
                    aligned_side(x, plan.proj_in, plan.packed, plan.rank_in) &&
                    aligned_side(dy, plan.proj_out, plan.packed, plan.rank_out);
  const Kernel& chosen =
      kernel((plan.chosen != nullptr ? "coordinates." : "gradients.") + part("x", x.dtype) + "," +
             part("dy", dy.dtype) + "," + part("project_in", plan.proj_in != nullptr) + "," +
             part("project_out", plan.proj_out != nullptr) + "," + part("packed", plan.packed) + "," +
             part("aligned", fast));
  expect(constant(chosen, "CHUNK") == kChunk, "the library and its kernels disagree about CHUNK");
  return chosen;
}

/// The tokens' mask, or a single 1 in the workspace where all tokens count.
const std::uint8_t* mask_of(const Plan& plan, Stream stream) {
  if (plan.examples->mask != nullptr) return plan.examples->mask;
  expect_success(driver().fill8(address(plan.keep_all), 1, 1, stream), "mask");
  return plan.keep_all;
}

/// The scale of the chosen elements, or ones in the workspace.
const float* scale_of(const Plan& plan, Stream stream) {
  if (plan.chosen->scale != nullptr) return plan.chosen->scale;
  const std::size_t count = static_cast<std::size_t>(plan.chosen->count);
  expect_success(driver().fill32(address(plan.ones), 0x3f800000u, count, stream), "scale");
  return plan.ones;
}

/// The gradients of examples of one chunk, into out; the sums of all chunks, into partial, for the others.
void launch_gradients(const Plan& plan, float* out, float* partial, Stream stream) {
  const logra_cuda_examples& examples = *plan.examples;
  const logra_cuda_tokens &x = *plan.x, &dy = *plan.dy;
  const logra_cuda_matrix *proj_in = plan.proj_in, *proj_out = plan.proj_out;
  const Kernel& chosen = gradients_kernel(plan, out, partial);
  const bool masked = examples.mask != nullptr, packed = plan.packed;
  Launch launch(chosen);
  launch.pointer(x.data).pointer(dy.data);
  if (proj_in != nullptr) launch.pointer(proj_in->data);
  if (proj_out != nullptr) launch.pointer(proj_out->data);
  launch.pointer(mask_of(plan, stream));
  if (packed) launch.pointer(examples.cu_seqlens);
  launch.pointer(out).pointer(partial);
  if (plan.chosen != nullptr) {
    launch.pointer(plan.chosen->positions).pointer(scale_of(plan, stream));
    launch.number("count", plan.chosen->count);
  }
  launch.number("modules", 1).number("num_examples", examples.num_examples).number("num_tokens", plan.slots);
  launch.number("num_tokens", examples.num_tokens).number("num_tokens", plan.chunks);
  launch.number("x.dim", x.dim).number("dy.dim", dy.dim);
  launch.number("proj_in.rows", plan.rank_in).number("proj_out.rows", plan.rank_out);
  launch.wide(packed ? 0 : x.example_stride).wide(x.token_stride);
  launch.wide(packed ? 0 : dy.example_stride).wide(dy.token_stride);
  launch.wide(proj_in != nullptr ? proj_in->row_stride : 0);
  launch.wide(proj_out != nullptr ? proj_out->row_stride : 0);
  launch.wide(masked && !packed ? examples.num_tokens : 0).wide(masked);
  launch.run(plan.slots * ceil_div(plan.rank_in, constant(chosen, "RANK_IN")) *
                 ceil_div(plan.rank_out, constant(chosen, "RANK_OUT")),
             stream);
}

/// Adds the sums of each example's chunks, in their order.
void launch_reduce(const Plan& plan, float* out, const float* partial, Stream stream) {
  const Kernel& chosen = kernel("reduce." + part("packed", plan.packed));
  expect(constant(chosen, "CHUNK") == kChunk, "the library and its kernels disagree about CHUNK");
  const logra_cuda_examples& examples = *plan.examples;
  Launch launch(chosen);
  launch.pointer(partial);
  if (plan.packed) launch.pointer(examples.cu_seqlens);
  launch.pointer(out).number("modules", 1).number("num_examples", examples.num_examples);
  launch.number("num_tokens", plan.slots).number("num_tokens", examples.num_tokens);
  launch.number("num_tokens", plan.chunks).number("proj_in.rows", plan.size());
  launch.run(examples.num_examples * ceil_div(plan.size(), constant(chosen, "REDUCE")), stream);
}

void run(const Plan& plan, float* out, const Workspace& memory, Stream stream) {
  if (plan.examples->num_examples == 0 || plan.size() == 0) return;
  expect(out != nullptr, "out: expected a pointer, got NULL");
  expect(plan.chosen == nullptr || plan.chosen->positions != nullptr,
         "positions: expected a pointer, got NULL");
  expect(plan.examples->num_tokens == 0 || (plan.x->data != nullptr && plan.dy->data != nullptr),
         "x.data, dy.data: expected pointers, got NULL");
  memory.expect_room();
  float* partial = plan.partial != nullptr ? plan.partial : out;
  launch_gradients(plan, out, partial, stream);
  if (plan.chunks > 1) launch_reduce(plan, out, partial, stream);
}

}  // namespace
}  // namespace logra::cuda

using namespace logra::cuda;

std::size_t logra_cuda_projected_gradients_workspace(const logra_cuda_examples* examples,
                                                     const logra_cuda_tokens* x, const logra_cuda_tokens* dy,
                                                     const logra_cuda_matrix* proj_in,
                                                     const logra_cuda_matrix* proj_out) {
  return workspace_bytes(
      [&](Workspace& workspace) { Plan(examples, x, dy, proj_in, proj_out, nullptr, workspace); });
}

logra_cuda_status logra_cuda_projected_gradients(const logra_cuda_examples* examples,
                                                 const logra_cuda_tokens* x, const logra_cuda_tokens* dy,
                                                 const logra_cuda_matrix* proj_in,
                                                 const logra_cuda_matrix* proj_out, float* out,
                                                 void* workspace, std::size_t workspace_bytes,
                                                 logra_cuda_stream stream) {
  return guarded([&] {
    Workspace memory(workspace, workspace_bytes);
    run(Plan(examples, x, dy, proj_in, proj_out, nullptr, memory), out, memory, stream);
  });
}

std::size_t logra_cuda_projected_coordinates_workspace(
    const logra_cuda_examples* examples, const logra_cuda_tokens* x, const logra_cuda_tokens* dy,
    const logra_cuda_matrix* proj_in, const logra_cuda_matrix* proj_out, std::int64_t count) {
  const Chosen chosen{count, nullptr, nullptr};
  return workspace_bytes(
      [&](Workspace& workspace) { Plan(examples, x, dy, proj_in, proj_out, &chosen, workspace); });
}

logra_cuda_status logra_cuda_projected_coordinates(const logra_cuda_examples* examples,
                                                   const logra_cuda_tokens* x, const logra_cuda_tokens* dy,
                                                   const logra_cuda_matrix* proj_in,
                                                   const logra_cuda_matrix* proj_out, std::int64_t count,
                                                   const std::int32_t* positions, const float* scale,
                                                   float* out, void* workspace, std::size_t workspace_bytes,
                                                   logra_cuda_stream stream) {
  return guarded([&] {
    Workspace memory(workspace, workspace_bytes);
    const Chosen chosen{count, positions, scale};
    run(Plan(examples, x, dy, proj_in, proj_out, &chosen, memory), out, memory, stream);
  });
}
