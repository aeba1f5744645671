// Memory that is kept between calls: what is new to a process costs a page fault every 4 KB, more than the work on it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace prefixmem {

// Bytes at a boundary of 64 bytes at least; large blocks at that of a huge page. Throws std::bad_alloc.
void* take(size_t bytes);
void give(void* block, size_t bytes);

// Bytes of freed blocks that are kept; returns what was kept before and frees what is over.
size_t keep_at_most(size_t bytes);
size_t bytes_kept();

// An array of plain values that is not initialized.
template <class T> class Array {
 public:
  Array() = default;
  explicit Array(int64_t size) : size_(size), data_(size > 0 ? static_cast<T*>(take(bytes())) : nullptr) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Array(Array&& other) noexcept : size_(other.size_), data_(other.data_) { other.data_ = nullptr, other.size_ = 0; }
  Array& operator=(Array&& other) noexcept {
    if (this != &other) {
      release();
      size_ = other.size_, data_ = other.data_;
      other.data_ = nullptr, other.size_ = 0;
    }
    return *this;
  }
  ~Array() { release(); }

  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  size_t bytes() const { return size_t(size_) * sizeof(T); }
  void release() {
    if (data_ != nullptr) give(data_, bytes());
    data_ = nullptr;
  }

  int64_t size_ = 0;
  T* data_ = nullptr;
};

}  // namespace prefixmem
