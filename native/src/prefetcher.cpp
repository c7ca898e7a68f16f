#include "prefetcher.h"

#include "elapsed.h"
#include "layer_step.h"

#include <algorithm>
#include <chrono>
#include <numeric>

namespace pye {

namespace {

constexpr float kFading      = 0.98f; // of a rank's record with every guess; about the last fifty count
constexpr float kPrior       = 8.0f;  // guesses' worth of belief before there are any
constexpr float kPriorChance = 0.5f;
constexpr float kUnproven    = 0.3f; // chance of a guess before there is any record: not enough to read anything
constexpr float kUnseen      = 0.1f; // chance that what is pushed out was needed, likewise
constexpr float kMostRoom    = 16.0f;
constexpr float kPriorMoved  = 0.5f; // of a wanted expert, at first
constexpr float kLeastMoved  = 0.1f; // what is never found out when nothing is read

constexpr uint32_t kMovedPrior = 8;  // prefetches' worth of belief in kPriorMoved
constexpr uint32_t kStandings  = 8;  // parts of a layer's experts, by priority
constexpr uint32_t kTrial      = 64; // times asked before a predictor may be passed over
constexpr uint32_t kMemory     = 64; // values that count in a mean
constexpr uint32_t kSkipped    = 16; // one that is passed over is asked once in so many times
constexpr size_t   kMostAsked  = 8;  // tokens of a prompt that a predictor looks at

} // namespace

float Prefetcher::Record::chance(uint32_t rank, float belief) const {
    const float n = rank < tried.size() ? tried[rank] : 0.0f;
    const float r = rank < right.size() ? right[rank] : 0.0f;
    const float p = rank < prior.size() ? prior[rank] : belief;
    return (r + kPrior * p) / (n + kPrior);
}

float Prefetcher::Record::overall() const {
    const float n = std::accumulate(tried.begin(), tried.end(), 0.0f);
    return (std::accumulate(right.begin(), right.end(), 0.0f) + kPrior * kPriorChance) / (n + kPrior);
}

// Rank and standing taken as independent witnesses: their odds multiply.
float Prefetcher::Guesser::chance(uint32_t rank, uint32_t standing) const {
    const auto odds = [](float chance) {
        return std::clamp(chance, 0.01f, 0.99f) / (1.0f - std::clamp(chance, 0.01f, 0.99f));
    };
    const float by_rank = record.chance(rank, all == nullptr ? kUnproven : all->chance(rank, kUnproven));
    const float both    = odds(by_rank) * odds(standings.chance(standing, kPriorChance)) / odds(standings.overall());
    return both / (1.0f + both);
}

void Prefetcher::Average::add(float one) { value += (one - value) / static_cast<float>(std::min(++n, kMemory)); }

void Prefetcher::Record::add(uint32_t rank, bool was_right) {
    if (rank >= tried.size()) {
        tried.resize(rank + 1, 0.0f);
        right.resize(rank + 1, 0.0f);
    }
    tried[rank] = kFading * tried[rank] + 1.0f;
    right[rank] = kFading * right[rank] + (was_right ? 1.0f : 0.0f);
}

Prefetcher::Prefetcher(const ExpertIndex & index, std::vector<SlotStore *> stores, ExpertSource & source,
                       EventRing & events, Timeline & timeline, pye_stats & stats)
    : index_(index), stores_(std::move(stores)), source_(source), events_(events), timeline_(timeline), stats_(stats),
      rules_(), told_(index.layers.size()), replayed_(index.layers.size()), begun_(index.layers.size(), 0) {
    rules_.least_chance  = 0.4f;
    rules_.replay_recall = -1.0f;
    rules_.preempt = rules_.reorder = rules_.replay_distance = 1;
    moved_.fill({kPriorMoved, kMovedPrior});
    for (const ShapeClass & c : index_.classes) {
        unused_.emplace_back(c.n_expert, 0);
        watched_.emplace_back(c.n_expert, 0);
    }
    for (uint32_t layer = 0; layer < told_.size(); ++layer) {
        told_[layer].target = replayed_[layer].target = layer;
        replayed_[layer].all                          = &all_[Replayed];
    }
}

void Prefetcher::set_predictors(std::vector<Predictor> predictors) {
    std::stable_sort(predictors.begin(), predictors.end(), [](const Predictor & a, const Predictor & b) {
        return a.source != b.source ? a.source < b.source : a.target < b.target;
    });
    seers_.clear();
    for (Predictor & p : predictors) {
        Seer seer;
        seer.one.target = seer.many.target = p.target;
        seer.one.record.prior              = p.chances;
        seer.one.all                       = &all_[One];
        seer.many.all                      = &all_[Many];
        seer.predictor                     = std::move(p);
        seers_.push_back(std::move(seer));
    }
}

void Prefetcher::set_rules(const pye_prefetch_rules & rules) {
    rules_ = rules;
    source_.set_preemption(rules.preempt != 0);
}

void Prefetcher::settle() {
    DiskTier::Landed one;
    while (!loads_.empty() && source_.disk().load_poll(&one)) {
        landed(one);
    }
}

bool Prefetcher::landed(const DiskTier::Landed & landed) {
    const uint32_t shape_class = ExpertSource::class_of(landed), slot = ExpertSource::slot_of(landed);
    const auto     load = std::find_if(loads_.begin(), loads_.end(),
                                       [&](const Load & l) { return l.shape_class == shape_class && l.slot == slot; });
    if (load == loads_.end()) {
        return false;
    }
    SlotStore & store = *stores_[shape_class];
    source_.landed(load->layer, load->expert, slot, landed.ok);
    timeline_.add(PYE_SPAN_PREFETCH, load->layer, load->expert, landed.begun, landed.ended,
                  landed.ok ? Timeline::None : Timeline::GivenUp);
    if (landed.ok) {
        store.landed(slot);
        store.unpin(slot);
        unused_[shape_class][slot] = static_cast<uint8_t>(1 + load->kind);
    } else {
        store.failed(slot);
        ++(landed.cancelled ? stats_.prefetches_wasted : stats_.prefetches_failed);
    }
    loads_.erase(load);
    return true;
}

void Prefetcher::spoken(uint32_t layer, const std::vector<Wanted> & wanted) {
    for (Seer & seer : seers_) {
        judge(seer.one, layer, wanted);
        judge(seer.many, layer, wanted);
    }
    judge(told_[layer], layer, wanted);
    judge(replayed_[layer], layer, wanted);
    judge_displaced(layer, wanted);
    uint32_t n_unread = 0;
    for (Load & load : loads_) {
        if (load.layer != layer || load.keeps()) {
            continue;
        }
        n_unread += source_.unread(load.layer, load.slot) > 0.0f;
        const bool is_wanted =
            std::any_of(wanted.begin(), wanted.end(), [&load](const Wanted & w) { return w.expert == load.expert; });
        if (!is_wanted && rules_.preempt != 0) {
            give_up(load);
        }
    }
    // Fate caps by measured overlap; here the overlap is found by trying: a little more while all arrive, less when not.
    if (n_unread > 0) {
        room_ = std::max(1.0f, 0.9f * room_);
    } else if (begun_[layer] > 0 && static_cast<float>(begun_[layer]) + 1.0f > room_) {
        room_ = std::min(kMostRoom, room_ + 0.25f);
    }
    begun_[layer] = 0;
    store_of(layer).forget_expected(index_.layers[layer].first, index_.layers[layer].n_expert);
}

// What became of the guesses about a layer.
void Prefetcher::judge(Guesser & guesser, uint32_t layer, const std::vector<Wanted> & wanted) {
    if (guesser.target != layer || !guesser.asked) {
        return;
    }
    uint32_t n_right = 0;
    for (const Guess & g : guesser.pending) {
        const bool right =
            std::any_of(wanted.begin(), wanted.end(), [&g](const Wanted & w) { return w.expert == g.expert; });
        guesser.record.add(g.rank, right);
        if (guesser.all != nullptr) {
            guesser.all->add(g.rank, right);
        }
        guesser.standings.add(g.standing, right);
        n_right += right;
    }
    stats_.guesses += guesser.pending.size();
    stats_.guesses_right += n_right;
    guesser.worth.add(static_cast<float>(n_right));
    guesser.asked = false;
    guesser.pending.clear();
}

// Whether what guesses push out, or would, was wanted.
void Prefetcher::judge_displaced(uint32_t layer, const std::vector<Wanted> & wanted) {
    const ExpertLayer & l       = index_.layers[layer];
    uint8_t *           watched = &watched_[l.shape_class][l.first];
    for (uint32_t expert = 0; expert < l.n_expert; ++expert) {
        if (watched[expert] != 0) {
            displaced_[watched[expert] - 1u].add(
                0,
                std::any_of(wanted.begin(), wanted.end(), [expert](const Wanted & w) { return w.expert == expert; }));
            watched[expert] = 0;
        }
    }
}

void Prefetcher::used(uint32_t layer, uint32_t expert) {
    const uint32_t shape_class = index_.layers[layer].shape_class;
    uint8_t &      unused      = unused_[shape_class][store_of(layer).slot_of(dense(layer, expert))];
    if (unused != 0) {
        ++stats_.prefetch_hits;
        moved(static_cast<Kind>(unused - 1), 1.0f);
        unused = 0;
    }
}

// A wanted expert's prefetch had brought this share of it.
void Prefetcher::moved(Kind kind, float share) {
    if (kind != Keep) {
        moved_[kind].add(share);
    }
}

void Prefetcher::evicted(uint32_t shape_class, uint32_t slot) {
    stats_.prefetches_wasted += unused_[shape_class][slot] != 0;
    unused_[shape_class][slot] = 0;
}

bool Prefetcher::adopt(uint32_t layer, uint32_t expert) {
    const auto load = std::find_if(loads_.begin(), loads_.end(),
                                   [&](const Load & l) { return l.layer == layer && l.expert == expert; });
    if (load == loads_.end() || load->given_up) {
        return false;
    }
    moved(load->kind, 1.0f - source_.unread(layer, load->slot));
    if (rules_.preempt != 0) {
        source_.promote(layer, load->slot);
    }
    loads_.erase(load);
    ++stats_.prefetches_late;
    return true;
}

bool Prefetcher::listens(uint32_t layer) const {
    return guessing_ &&
           std::any_of(seers_.begin(), seers_.end(), [layer](const Seer & s) { return s.predictor.source == layer; });
}

void Prefetcher::predict(uint32_t layer, const std::vector<const float *> & inputs) {
    if (!guessing_ || seers_.empty() || inputs.empty()) {
        return;
    }
    const auto start = std::chrono::steady_clock::now();
    const auto in    = [&](Seer & seer) -> Guesser & { return inputs.size() == 1 ? seer.one : seer.many; };
    for (size_t first = 0, end; first < seers_.size(); first = end) {
        const Predictor & p = seers_[first].predictor;
        const auto        next =
            std::find_if(seers_.begin() + static_cast<std::ptrdiff_t>(first), seers_.end(), [&p](const Seer & s) {
                return s.predictor.source != p.source || s.predictor.target != p.target;
            });
        end = static_cast<size_t>(next - seers_.begin());
        if (p.source != layer || everything_is_here(p.target)) {
            continue;
        }
        size_t best = first;
        for (size_t i = first; i < end; ++i) {
            best = in(seers_[i]).worth.value > in(seers_[best]).worth.value ? i : best;
        }
        for (size_t i = first; i < end; ++i) {
            Guesser &  guesser = in(seers_[i]);
            const bool new_one = guesser.worth.n < kTrial;
            if (!new_one && (i != best || guesser.idle) && ++guesser.n_skipped % kSkipped != 0) {
                continue;
            }
            guess(guesser, votes(seers_[i].predictor, inputs), i == best, inputs.size() == 1 ? One : Many);
        }
    }
    stats_.predict_ns += nanoseconds_since(start);
    timeline_.until_now(PYE_SPAN_PREDICT, layer, start);
}

void Prefetcher::predict_replayed(uint32_t layer, const Replay & replay) {
    if (!guessing_ || rules_.replay_recall < 0.0f) {
        return;
    }
    const auto start    = std::chrono::steady_clock::now();
    const auto distance = static_cast<uint32_t>(std::max(1, rules_.replay_distance));
    // The first layer has nobody before it, so it also guesses what lies between.
    for (uint32_t target = layer == 0 ? 1 : layer + distance; target <= layer + distance; ++target) {
        if (target < replayed_.size()) {
            guess(replayed_[target], replayed(target, replay.next(target)), true, Replayed);
        }
    }
    stats_.predict_ns += nanoseconds_since(start);
    timeline_.until_now(PYE_SPAN_PREDICT, layer, start);
}

// The guesses about one token; of several tokens, the experts that some of them are likeliest to want: a token's guess has as
// many votes as guesses are ranked from it on. With a vote each, steps of four texts found 42.6 % of the absent experts that
// they needed among the first eight named, so 46.8 %; who knew would name 48.9 % (bench/correlation.py).
std::vector<uint32_t> Prefetcher::votes(Predictor & predictor, const std::vector<const float *> & inputs) {
    if (inputs.size() == 1) {
        return predictor.guess(inputs[0]);
    }
    std::vector<uint32_t> n(predictor.n_expert, 0), order;
    const size_t          n_asked = std::min(inputs.size(), kMostAsked);
    for (size_t i = 0; i < n_asked; ++i) {
        const std::vector<uint32_t> & guesses = predictor.guess(inputs[i * inputs.size() / n_asked]);
        for (size_t rank = 0; rank < guesses.size(); ++rank) {
            const uint32_t expert = guesses[rank];
            if (n[expert] == 0) {
                order.push_back(expert);
            }
            n[expert] += static_cast<uint32_t>(guesses.size() - rank);
        }
    }
    std::stable_sort(order.begin(), order.end(), [&n](uint32_t a, uint32_t b) { return n[a] > n[b]; });
    return order;
}

// The next layer's ids with as many errors as the rules say: what a predictor of that recall would have guessed.
std::vector<uint32_t> Prefetcher::replayed(uint32_t target, const std::vector<int32_t> & ids) {
    const uint32_t        n_expert = index_.layers[target].n_expert;
    std::vector<uint32_t> guesses;
    const auto            roll = [this] {
        chance_ = chance_ * 1664525u + 1013904223u;
        return chance_ >> 8;
    };
    for (int32_t id : ids) {
        auto expert = static_cast<uint32_t>(id);
        if (static_cast<float>(roll()) >= rules_.replay_recall * static_cast<float>(1u << 24)) {
            do {
                expert = roll() % n_expert;
            } while (n_expert > ids.size() &&
                     std::find(ids.begin(), ids.end(), static_cast<int32_t>(expert)) != ids.end());
        }
        if (std::find(guesses.begin(), guesses.end(), expert) == guesses.end()) {
            guesses.push_back(expert);
        }
    }
    return guesses;
}

// In which part of its layer's experts the policy would keep this one: 0 the first to stay, kStandings - 1 the first to go.
uint32_t Prefetcher::standing(uint32_t layer, uint32_t expert) const {
    const ExpertLayer & l     = index_.layers[layer];
    const SlotStore &   store = *stores_[l.shape_class];
    uint32_t            above = 0;
    for (uint32_t other = 0; other < l.n_expert; ++other) {
        above += store.priority(l.first + other) > store.priority(l.first + expert);
    }
    return above * kStandings / l.n_expert;
}

// Then there is nothing to guess.
bool Prefetcher::everything_is_here(uint32_t layer) const {
    const uint32_t shape_class = index_.layers[layer].shape_class;
    return stores_[shape_class]->n_resident() == index_.classes[shape_class].n_expert;
}

// Whether an absent expert is worth a read and the slot that it takes. Who leaves for it may be wanted, and when it is
// read again the next one leaves, and so on.
bool Prefetcher::pays(uint32_t target, uint32_t expert, float chance, Kind kind) {
    if (chance < rules_.least_chance) {
        return false;
    }
    const uint32_t leaves = store_of(target).would_leave(dense(target, expert));
    if (leaves == SlotStore::kNone) {
        return true;
    }
    watched_[index_.layers[target].shape_class][leaves] = static_cast<uint8_t>(1 + kind);
    const float needed                                  = std::min(0.99f, displaced_[kind].chance(0, kUnseen));
    return rules_.least_chance <= 0.0f ||
           chance * std::max(kLeastMoved, moved_[kind].value) >= needed / (1.0f - needed);
}

void Prefetcher::guess(Guesser & guesser, const std::vector<uint32_t> & experts, bool begins, Kind kind) {
    const uint32_t target = guesser.target;
    SlotStore &    store  = store_of(target);
    auto n = static_cast<float>(std::count_if(loads_.begin(), loads_.end(),
                                              [target](const Load & l) { return l.layer == target && !l.keeps(); }));
    guesser.pending.clear();
    guesser.asked = true;
    guesser.idle  = true;
    for (uint32_t rank = 0; rank < experts.size(); ++rank) {
        const uint32_t expert = experts[rank];
        const uint32_t stands = standing(target, expert);
        const float    chance = guesser.chance(rank, stands);
        if (store.slot_of(dense(target, expert)) != SlotStore::kNone) {
            const bool likely = chance >= rules_.least_chance;
            guesser.idle      = guesser.idle && !likely;
            if (likely && begins) {
                store.expect(dense(target, expert)); // what is here already stays until its layer has spoken
            }
            continue;
        }
        guesser.pending.push_back({expert, rank, stands});
        const bool worth = pays(target, expert, chance, kind);
        guesser.idle     = guesser.idle && !worth;
        if (worth && begins && n + 1.0f <= room_ && begin(target, expert, kind, true)) {
            store.expect(dense(target, expert));
            n += 1.0f;
        }
    }
}

void Prefetcher::expect(uint32_t layer, const std::vector<uint32_t> & experts, bool keep) {
    if (!keep) {
        if (guessing_) {
            guess(told_[layer], experts, true, One);
        }
        return;
    }
    SlotStore & store = store_of(layer);
    for (uint32_t expert : experts) {
        if (store.slot_of(dense(layer, expert)) == SlotStore::kNone) {
            begin(layer, expert, Keep, false);
        }
    }
}

void Prefetcher::stream(uint32_t layer) {
    SlotStore &    store    = store_of(layer);
    const uint32_t n_expert = index_.layers[layer].n_expert;
    for (uint32_t e = 0; e < n_expert; ++e) {
        if (store.slot_of(dense(layer, e)) != SlotStore::kNone) {
            store.expect(dense(layer, e));
        }
    }
    for (uint32_t e = 0; e < n_expert; ++e) {
        if (store.slot_of(dense(layer, e)) == SlotStore::kNone && !begin(layer, e, Many, true)) {
            return;
        }
    }
}

void Prefetcher::promote(uint32_t layer, uint32_t expert) {
    SlotStore &    store  = store_of(layer);
    const uint32_t leaves = store.would_leave(dense(layer, expert));
    const bool better = leaves == SlotStore::kNone || store.priority(leaves) <= store.priority(dense(layer, expert));
    if (loads_.empty() && better && store.slot_of(dense(layer, expert)) == SlotStore::kNone) {
        begin(layer, expert, Keep, true);
    }
}

bool Prefetcher::begin(uint32_t layer, uint32_t expert, Kind kind, bool evict) {
    SlotStore &    store   = store_of(layer);
    uint32_t       evicted = SlotStore::kNone;
    const uint32_t slot    = store.claim_for_prefetch(dense(layer, expert), evict, &evicted);
    if (slot == SlotStore::kNone) {
        return false;
    }
    const uint32_t shape_class = index_.layers[layer].shape_class;
    if (evicted != SlotStore::kNone) {
        ++stats_.evictions;
        this->evicted(shape_class, slot);
        const auto [owner, id] = index_.owner(shape_class, evicted);
        source_.evicted(owner, id, slot, store.victim_passed());
        events_.push({static_cast<uint32_t>(stats_.steps_layers), static_cast<uint16_t>(owner),
                      static_cast<uint16_t>(id), PYE_EVENT_EVICT, 0});
    }
    source_.load_begin(layer, expert, slot, Urgency::Prefetch);
    loads_.push_back({layer, expert, shape_class, slot, kind, false});
    ++stats_.prefetches;
    begun_[layer] += kind != Keep;
    events_.push({static_cast<uint32_t>(stats_.steps_layers), static_cast<uint16_t>(layer),
                  static_cast<uint16_t>(expert), PYE_EVENT_PREFETCH, 0});
    return true;
}

void Prefetcher::give_up(Load & load) {
    if (!load.given_up) {
        load.given_up = true;
        source_.cancel(load.layer, load.slot);
    }
}

bool Prefetcher::give_way(uint32_t shape_class) {
    for (auto load = loads_.rbegin(); load != loads_.rend(); ++load) { // the last was the least likely
        if (load->shape_class == shape_class && !load->given_up) {
            give_up(*load);
            return true;
        }
    }
    return std::any_of(loads_.begin(), loads_.end(),
                       [shape_class](const Load & l) { return l.shape_class == shape_class; });
}

void Prefetcher::drain() {
    for (Load & load : loads_) {
        give_up(load);
    }
    while (!loads_.empty()) {
        landed(source_.disk().load_wait());
    }
}

} // namespace pye
