// Loads experts that are likely to be needed soon, so that they are there when the router names them. Every prefetch is
// advice: it may fail, come late or be wrong without harm.
//
// A guess is admitted by what it is worth: how often guesses of its rank, and about experts of its standing with the cache
// policy, came true of late when they were absent; whether the part of a read that is hidden in this way outweighs how
// often what is pushed out was wanted meanwhile; and no more are under way than have been found to arrive in time. Nothing is read on faith: where a layer has shown little, the
// others' record counts. When a layer's router has spoken, its prefetches are demand loads or are given up (early
// preemption, ProMoE).
//
// Predictors of the same source and target are alternatives: the one that named more of the missing experts of late has its
// say, the others are tried now and then; so is one whose guesses are not worth a read.
//
// The engine's lock covers it.
#pragma once

#include "disk_tier.h"
#include "event_ring.h"
#include "expert_index.h"
#include "expert_source.h"
#include "predictor.h"
#include "pyengine.h"
#include "replay.h"
#include "slot_store.h"
#include "timeline.h"

#include <array>
#include <memory>
#include <vector>

namespace pye {

struct Wanted;

class Prefetcher {
  public:
    Prefetcher(const ExpertIndex & index, std::vector<SlotStore *> stores, ExpertSource & source, EventRing & events,
               Timeline & timeline, pye_stats & stats);

    void set_predictors(std::vector<Predictor> predictors);
    void set_rules(const pye_prefetch_rules & rules);
    void set_guessing(bool on) { guessing_ = on; }
    // Whether anybody guesses from the gate inputs of this layer.
    bool listens(uint32_t layer) const;

    // Takes every load that has landed between two FFNs.
    void settle();
    // True if the load was a prefetch that nobody waits for: its slot is ready, or free again.
    bool landed(const DiskTier::Landed & landed);

    // The router of a layer has spoken; before the look-up of the experts it wants.
    void spoken(uint32_t layer, const std::vector<Wanted> & wanted);
    // A wanted expert was found resident: the first time, that is what its prefetch was for.
    void used(uint32_t layer, uint32_t expert);
    // A wanted expert is on its way: from now on its load is the caller's, who waits for it. False if its prefetch has been
    // given up; the caller must wait until it has landed.
    bool adopt(uint32_t layer, uint32_t expert);
    // The guesses from a layer's gate inputs, one for each token, and their loads.
    void predict(uint32_t layer, const std::vector<const float *> & inputs);
    // The same in a replay: the ids that a later layer's router will name, each guessed right with the probability of the rules.
    void predict_replayed(uint32_t layer, const Replay & replay);
    // Experts that somebody else expects, likeliest first: in the layer's next step; or with `keep` some time, and then only
    // as far as there are empty slots.
    void expect(uint32_t layer, const std::vector<uint32_t> & experts, bool keep);
    // An expert has been computed elsewhere that the policy would rather have here than its victim: it comes if nothing else
    // is under way.
    void promote(uint32_t layer, uint32_t expert);
    // All experts of this layer are needed next, or nearly: what is absent is loaded, what is here stays.
    void                       stream(uint32_t layer);
    const pye_prefetch_rules & rules() const { return rules_; }

    // A demand load needs a slot of this class: gives one prefetch up. False if none is under way.
    bool   give_way(uint32_t shape_class);
    bool   under_way() const { return !loads_.empty(); }
    size_t n_under_way() const { return loads_.size(); }
    // Gives everything up and waits until nothing is being read for a prefetch.
    void drain();
    // The slot has been given to another expert.
    void evicted(uint32_t shape_class, uint32_t slot);

  private:
    // Of a guess: about a token alone, about several at once, in a replay; what is read to be kept is none.
    enum Kind : uint8_t { One, Many, Replayed, Keep };
    static constexpr size_t kGuessed = Keep;

    // A prefetch under way.
    struct Load {
        uint32_t layer, expert, shape_class, slot;
        Kind     kind;
        bool     given_up;
        bool     keeps() const { return kind == Keep; }
    };
    // A guess about a layer that has not spoken yet, of an expert that was absent.
    struct Guess {
        uint32_t expert, rank, standing;
    };
    // How often guesses of each rank came true, old ones fading.
    struct Record {
        std::vector<float> tried, right;
        std::vector<float> prior; // chance of each rank before there are guesses; of the others: `belief`
        float              chance(uint32_t rank, float belief) const;
        float              overall() const;
        void               add(uint32_t rank, bool was_right);
    };
    // The mean of what was added of late; `n` values' worth of `value` before there are any.
    struct Average {
        float    value;
        uint32_t n;
        void     add(float one);
    };
    // Whoever guesses about a layer, and what became of it.
    struct Guesser {
        uint32_t           target = UINT32_MAX;
        Record *           all    = nullptr; // by rank, of all layers; nullptr: there is no other layer
        Record             record;           // by rank
        Record             standings;        // by the expert's standing in its layer
        float              chance(uint32_t rank, uint32_t standing) const;
        std::vector<Guess> pending;
        bool               asked     = false;     // since the layer last spoke
        Average            worth     = {0.0f, 0}; // missing experts named, per time asked
        uint32_t           n_skipped = 0;
        bool               idle      = false; // not one of its ranks is worth a read
    };
    // A predictor asked about a token alone, and about several at once: two records, for they have little in common.
    struct Seer {
        Predictor predictor;
        Guesser   one, many;
    };

    void                  guess(Guesser & guesser, const std::vector<uint32_t> & experts, bool begins, Kind kind);
    bool                  pays(uint32_t target, uint32_t expert, float chance, Kind kind);
    bool                  begin(uint32_t layer, uint32_t expert, Kind kind, bool evict);
    void                  moved(Kind kind, float share);
    std::vector<uint32_t> votes(Predictor & predictor, const std::vector<const float *> & inputs);
    std::vector<uint32_t> replayed(uint32_t target, const std::vector<int32_t> & ids);
    void                  give_up(Load & load);
    void                  judge(Guesser & guesser, uint32_t layer, const std::vector<Wanted> & wanted);
    void                  judge_displaced(uint32_t layer, const std::vector<Wanted> & wanted);
    bool                  everything_is_here(uint32_t layer) const;
    uint32_t              standing(uint32_t layer, uint32_t expert) const;
    uint32_t              dense(uint32_t layer, uint32_t expert) const { return index_.layers[layer].first + expert; }
    SlotStore &           store_of(uint32_t layer) { return *stores_[index_.layers[layer].shape_class]; }

    const ExpertIndex &      index_;
    std::vector<SlotStore *> stores_; // by shape class
    ExpertSource &           source_;
    EventRing &              events_;
    Timeline &               timeline_;
    pye_stats &              stats_;
    pye_prefetch_rules       rules_;

    std::vector<Seer>                 seers_;     // alternatives side by side
    std::vector<Guesser>              told_;      // by layer: what expect() says
    std::vector<Guesser>              replayed_;  // by layer
    std::array<Record, kGuessed>      all_;       // by kind of guess: of all layers, by rank
    std::array<Record, kGuessed>      displaced_; // likewise, one rank: wanted when its layer spoke next
    std::array<Average, kGuessed>     moved_;     // likewise: the part of a wanted expert that had been read by then
    std::vector<std::vector<uint8_t>> watched_;   // by class and expert: 1 + the kind of guess that it would leave for
    std::vector<Load>                 loads_;
    std::vector<uint32_t>             begun_;  // by layer: prefetches since it last spoke
    std::vector<std::vector<uint8_t>> unused_; // by class and slot: 1 + the kind of prefetch; 0: none, or used since
    bool                              guessing_ = true;
    float                             room_     = 2; // prefetches for one layer that have been found to arrive in time
    uint32_t                          chance_   = 1; // state of the generator of replayed guesses
};

} // namespace pye
