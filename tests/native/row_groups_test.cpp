#include "row_groups.h"

#include "check.h"

using pye::RowGroups;

namespace {

std::vector<int32_t> of(const RowGroups & groups, uint32_t expert) {
    return {groups.pairs(expert), groups.pairs(expert) + groups.count(expert)};
}

} // namespace

TEST(pairs_of_an_expert_in_the_order_of_tokens) {
    RowGroups groups;
    groups.assign({3, 0, 1, 3, 0, 3}, 5); // three tokens of two ranks
    CHECK(of(groups, 0) == (std::vector<int32_t>{1, 4}));
    CHECK(of(groups, 1) == (std::vector<int32_t>{2}));
    CHECK(of(groups, 2).empty());
    CHECK(of(groups, 3) == (std::vector<int32_t>{0, 3, 5}));
    CHECK(of(groups, 4).empty());
}

TEST(nothing_of_the_step_before_is_left) {
    RowGroups groups;
    groups.assign({1, 1, 1, 1}, 2);
    groups.assign({2, 0}, 3);
    CHECK(of(groups, 0) == (std::vector<int32_t>{1}));
    CHECK(of(groups, 1).empty());
    CHECK(of(groups, 2) == (std::vector<int32_t>{0}));
    groups.assign({}, 3);
    CHECK(of(groups, 2).empty());
}
