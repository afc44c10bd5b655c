// Tasks over XLA's thread pool, and memory that each thread keeps from call to call.
#pragma once

#include <cstddef>
#include <type_traits>

#include "problem.hpp"

namespace nca {

class Pool {  // runs tasks on threads; see handlers.cpp
 public:
  virtual ~Pool() = default;
  // Runs body(context, task) for every task below `tasks`, in any order, on any thread.
  virtual void run(Index tasks, void (*body)(void*, Index), void* context) = 0;
};

template <class Body>
void parallel_for(Pool& pool, Index tasks, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  pool.run(tasks, [](void* context, Index task) { (*static_cast<Plain*>(context))(task); }, &body);
}

// Memory of the calling thread that lives until the scope ends, aligned to 64 bytes.
class Scope {
 public:
  Scope();
  ~Scope();
  Scope(const Scope&) = delete;
  float* floats(Index count) { return static_cast<float*>(bytes(count * Index{sizeof(float)})); }
  template <class T>
  T* array(Index count) {
    return static_cast<T*>(bytes(count * Index{sizeof(T)}));
  }

 private:
  void* bytes(Index count);
  std::size_t block_, used_;
};

}  // namespace nca
