// Included once per instruction set, inside its namespace, after Vec and VecD: conversions of a row.

template <class T>
static void widen_f32(const void* const* rows, std::size_t offset, std::size_t num_rows, std::size_t n,
                      float* to, std::size_t to_stride, std::size_t padded) {
  for (std::size_t r = 0; r < num_rows; ++r, to += to_stride) {
    const T* from = static_cast<const T*>(rows[r]) + offset;
    std::size_t i = 0;
    for (; i + Vec::kLanes <= n; i += Vec::kLanes) Vec::store(to + i, Vec::load(from + i));
    if (i < n) Vec::store_n(to + i, Vec::load_n(from + i, n - i), n - i);
    for (i = n; i < padded; ++i) to[i] = 0.0f;
  }
}

template <class T>
static void widen_f64(const void* const* rows, std::size_t offset, std::size_t num_rows, std::size_t n,
                      double* to, std::size_t to_stride, std::size_t padded) {
  float wide[Vec::kLanes];
  for (std::size_t r = 0; r < num_rows; ++r, to += to_stride) {
    const T* from = static_cast<const T*>(rows[r]) + offset;
    for (std::size_t i = 0; i < n; i += Vec::kLanes) {
      const std::size_t count = n - i < Vec::kLanes ? n - i : Vec::kLanes;
      Vec::store(wide, Vec::load_n(from + i, count));
      for (std::size_t j = 0; j < count; ++j) to[i + j] = static_cast<double>(wide[j]);
    }
    for (std::size_t i = n; i < padded; ++i) to[i] = 0.0;
  }
}

template <class T>
static std::uint32_t largest_bits(const void* from, std::size_t n) {
  const T* p = static_cast<const T*>(from);
  Bits largest = Bits::zero();
  std::size_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) largest = Bits::max(largest, Bits::abs(Vec::load(p + i)));
  if (i < n) largest = Bits::max(largest, Bits::abs(Vec::load_n(p + i, n - i)));
  std::uint32_t lanes[Vec::kLanes], result = 0;
  Bits::store(lanes, largest);
  for (std::size_t j = 0; j < Vec::kLanes; ++j) result = lanes[j] > result ? lanes[j] : result;
  return result;
}

template <class T>
static void narrow(const void* from, float scale1, float scale2, std::uint16_t* to, std::size_t n) {
  const T* p = static_cast<const T*>(from);
  const Vec s1 = Vec::broadcast(scale1), s2 = Vec::broadcast(scale2);
  std::size_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) Vec::store_f16(to + i, mul(mul(Vec::load(p + i), s1), s2));
  if (i < n) {
    std::uint16_t lanes[Vec::kLanes];
    Vec::store_f16(lanes, mul(mul(Vec::load_n(p + i, n - i), s1), s2));
    for (std::size_t j = 0; i + j < n; ++j) to[i + j] = lanes[j];
  }
}

static void scale_f16(const std::uint16_t* from, double scale, float* to, std::size_t n) {
  float wide[Vec::kLanes];
  for (std::size_t i = 0; i < n; i += Vec::kLanes) {
    const std::size_t count = n - i < Vec::kLanes ? n - i : Vec::kLanes;
    Vec::store(wide, Vec::load_n(reinterpret_cast<const Float16*>(from) + i, count));
    for (std::size_t j = 0; j < count; ++j)
      to[i + j] = static_cast<float>(static_cast<double>(wide[j]) * scale);
  }
}
