// What makes a token visual, and how many of them there are: a matcher for each type of token.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "index.h"

namespace vlsp {

struct MaskByte {
  using Token = uint8_t;
  bool operator()(Token token) const { return token != 0; }
};

template <class T, int N>
struct OneOf {
  using Token = T;
  T ids[N];
  bool operator()(Token token) const {
    bool found = false;
    for (int k = 0; k < N; ++k) found |= token == ids[k];
    return found;
  }
};

// The sum has the width of a token, so that the loop vectorises without widening.
template <class Matcher>
int64_t count_visual(const Matcher& is_visual, const typename Matcher::Token* tokens, int64_t length) {
  using Lane = std::make_unsigned_t<typename Matcher::Token>;
  constexpr int64_t kChunk = int64_t{1} << 30;
  int64_t total = 0;
  for (int64_t start = 0; start < length; start += kChunk) {
    const int64_t stop = std::min(length, start + kChunk);
    Lane found = 0;
    for (int64_t i = start; i < stop; ++i) found += is_visual(tokens[i]);
    total += found;
  }
  return total;
}

// 1 in every byte of the word that is not 0: a mask made by a view may hold other bytes than 0 and 1.
inline uint64_t nonzero_bytes(uint64_t word) {
  constexpr uint64_t kLowBits = 0x7f7f7f7f7f7f7f7f;
  return (((word & kLowBits) + kLowBits) | word) >> 7 & 0x0101010101010101;
}

// Eight lanes in a word; 255 words cannot overflow a lane.
inline int64_t count_visual(const MaskByte&, const uint8_t* tokens, int64_t length) {
  constexpr int64_t kChunkWords = 255;
  constexpr uint64_t kEvenBytes = 0x00ff00ff00ff00ff;
  const int64_t num_words = length / 8;
  int64_t total = 0;
  for (int64_t start = 0; start < num_words; start += kChunkWords) {
    const int64_t stop = std::min(num_words, start + kChunkWords);
    uint64_t lanes = 0;
    for (int64_t i = start; i < stop; ++i) {
      uint64_t word;
      std::memcpy(&word, tokens + 8 * i, 8);
      lanes += nonzero_bytes(word);
    }
    const uint64_t pairs = (lanes & kEvenBytes) + (lanes >> 8 & kEvenBytes);
    total += static_cast<int64_t>(pairs * 0x0001000100010001 >> 48);
  }
  for (int64_t i = 8 * num_words; i < length; ++i) total += tokens[i] != 0;
  return total;
}

// Fewer ids than N are filled up with the first.
template <class T, int N, class Use>
void use_ids(const T* ids, int count, Use use) {
  OneOf<T, N> matcher;
  for (int k = 0; k < N; ++k) matcher.ids[k] = ids[k < count ? k : 0];
  use(matcher);
}

template <class T, class Use>
void with_ids(const Placeholders& visual, Use use) {
  T ids[kMaxPlaceholders];
  int count = 0;
  for (int k = 0; k < visual.count; ++k) {
    const T id = static_cast<T>(visual.ids[k]);
    if (id == visual.ids[k]) ids[count++] = id;  // no token equals an id beyond its type
  }
  if (count == 0) return;
  if (count == 1) return use_ids<T, 1>(ids, count, use);
  if (count == 2) return use_ids<T, 2>(ids, count, use);
  if (count <= 4) return use_ids<T, 4>(ids, count, use);
  use_ids<T, kMaxPlaceholders>(ids, count, use);
}

// Calls `use` with the matcher of these tokens, or not at all where no token can be visual.
template <class Use>
void with_matcher(TokenType type, const Placeholders& visual, Use use) {
  switch (type) {
    case TokenType::kInt32:
      return with_ids<int32_t>(visual, use);
    case TokenType::kInt64:
      return with_ids<int64_t>(visual, use);
    case TokenType::kMask:
      return use(MaskByte{});
  }
}

}  // namespace vlsp
