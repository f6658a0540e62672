// Included last in an instruction set's namespace: its table.
static constexpr Kernels kTable = {
    {dots<float>, dots<Float16>, dots<Bfloat16>},
    {stream<float>, stream<Float16>, stream<Bfloat16>},
    nullptr,  // dots_bf16
    Vec::kDirectQueries,
    project_f32,
    nullptr,  // project_bf16
    nullptr,  // transpose_bf16
    Vec::kPanelVecs * Vec::kLanes,
    outer_f32,
    outer_tokens,
    nullptr,  // outer_pairs
    nullptr,  // pair_bf16
    VecD::kPanelVecs * VecD::kLanes,
    outer_f64,
    {widen_f32<float>, widen_f32<Float16>, widen_f32<Bfloat16>},
    {widen_f64<float>, widen_f64<Float16>, widen_f64<Bfloat16>},
    {largest_bits<float>, largest_bits<Float16>, largest_bits<Bfloat16>},
    {narrow<float>, narrow<Float16>, narrow<Bfloat16>},
    scale_f16,
    multiply,
    read_all,
    select_candidates,
    select_replace,
    select_ranks,
    Vec::kLanes,
    Vec::kFactorVecs,
    Vec::kFactorRows,
    {transpose_rows<float>, transpose_rows<Float16>, transpose_rows<Bfloat16>},
    square_sums,
};
