// Plays frames round and round, and asks for the page's time only while it does.

// Frames a second; what the trajectory model was trained with.
const FPS = 8;

export class Player {
  #request = 0;

  /** show(frame): called for each frame, and once when it stops. */
  constructor(show) {
    this.show = show;
    this.frame = 0;
  }

  get playing() {
    return this.#request !== 0;
  }

  /** From a frame of a clip of so many frames. */
  play(frame, frames) {
    if (this.playing || frames < 2) return;
    this.frame = frame;
    const begun = performance.now() - (frame * 1000) / FPS;
    const tick = (now) => {
      // The half millisecond keeps rounded clocks from falling just short of a frame.
      const passed = Math.max(0, Math.floor(((now - begun + 0.5) / 1000) * FPS));
      this.#request = requestAnimationFrame(tick);
      if (passed % frames === this.frame) return;
      this.frame = passed % frames;
      this.show(this.frame);
    };
    this.#request = requestAnimationFrame(tick);
  }

  pause() {
    if (!this.playing) return;
    cancelAnimationFrame(this.#request);
    this.#request = 0;
    this.show(this.frame);
  }
}
